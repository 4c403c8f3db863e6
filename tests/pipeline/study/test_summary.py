"""Rows of a study: seeds joined sample by sample, pairs with full precision, ranks that only differ when methods do."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.metrics.bootstrap import paired
from pipeline.metrics.sums import Sums
from pipeline.study.grid import FULL, Cell
from pipeline.study.summary import as_table, figures, joined, ranks, rows
from tests.pipeline.study.outcomes import SAMPLES, STEPS, full, measured, outcome


@given(st.lists(st.tuples(st.floats(0, 9), st.floats(1, 9)), min_size=1, max_size=5), st.integers(1, 4))
def test_seeds_that_agree_are_joined_to_themselves(samples: list[tuple[float, float]], count: int) -> None:
    one = Sums(values=tuple(v for v, _ in samples), weights=tuple(w for _, w in samples))
    assert joined([one] * count).mean == pytest.approx(one.mean)


def test_seeds_are_joined_sample_by_sample() -> None:
    first = Sums(values=(1.0, 4.0), weights=(1.0, 2.0))
    second = Sums(values=(3.0, 0.0), weights=(1.0, 2.0))
    assert joined([first, second]) == Sums(values=(2.0, 2.0), weights=(1.0, 2.0))


def test_figures_of_a_cell_are_those_of_its_tasks() -> None:
    _, reference = full()
    found = figures(outcome(right=0.5, error=0.2), reference)
    assert found["match"].mean == 0.5
    assert (found["match.add"].mean, found["match.sort"].mean) == (1.0, 0.0)
    assert found["same_answers"].mean == 0.5
    assert found["same_tokens"].mean == pytest.approx((SAMPLES / 2 * 3 + SAMPLES / 2 * 2) / (3 * SAMPLES))
    assert [found[f"forced.{step}"].mean for step in range(1, STEPS + 1)] == pytest.approx([0.1, 0.2, 0.3])
    assert found["forced"].mean == pytest.approx(0.2)
    assert found["forced_mse.3"].mean == pytest.approx(0.6 / 8)
    assert found["free_mse"].mean == pytest.approx(0.4 / 8)
    assert found["nll.2"].mean == found["nll"].mean
    assert "same_answers" not in figures(reference, reference)


def test_a_row_stands_for_all_seeds() -> None:
    cells = [full(), *(measured("gptq", seed=seed, nll=0.2 + 0.1 * seed) for seed in range(3))]
    reference, row = rows(cells, [])
    assert (reference.method, row.seeds) == (FULL, (0, 1, 2))
    line = as_table([reference, row])[1]
    assert line["seeds"] == 3
    assert line["measured"]["nll"]["seeds"] == pytest.approx([0.2, 0.3, 0.4], abs=0.01)
    assert line["measured"]["nll"]["mean"] == pytest.approx(0.3, abs=0.01)
    assert line["linears"] == {"quantised": 8, "kept": 0}
    expected = paired(reference.sums["nll"], row.sums["nll"])
    assert line["measured"]["nll"]["against_full"] == vars(expected)
    assert 0.1 < expected.low <= expected.difference <= expected.high < 0.3


def test_free_runs_that_end_at_other_steps_are_joined_where_all_are() -> None:
    short = measured("gptq", seed=1)
    for name in ("by_step", "power"):
        del short[1]["tasks"]["trajectory"]["free"][name][-1]
    row = rows([full(), measured("gptq"), short], [])[1]
    assert f"free.{STEPS}" not in row.sums
    assert f"forced.{STEPS}" in row.sums


def test_ranks_are_equal_where_methods_cannot_be_told_apart() -> None:
    cells = [
        full(),
        measured("rtn", states="", nll=0.9),
        measured("gptq", nll=0.3),
        measured("awq", nll=0.3, seed=4),
        measured("rtn", "w8a8", states="", nll=0.11),
        full("other"),
        measured("rtn", states="", nll=0.4, model="other"),
    ]
    found = rows(cells, [])
    assert [ranks(found).get(number) for number in range(len(found))] == [None, 3, 1, 1, 1, None, 1]


@pytest.mark.parametrize(("right", "passes"), [(1.0, True), (0.95, False)])
def test_exact_match_is_held_to_one_point(right: float, passes: bool) -> None:
    line = as_table(rows([full(), measured("gptq", right=right)], []))[1]
    assert line["measured"]["match"]["not_inferior"] is passes


def test_what_could_not_be_measured_says_why() -> None:
    impossible = Cell(model="m", method="quarot", bits="w4a16", states="noised")
    failed = Cell(model="m", method="gptq", bits="w3a16", states="noised", seed=1)
    outcomes = [full(), measured("gptq", "w3a16"), (failed, {"tasks": {}, "failed": "Hessian of x stays singular"})]
    found = rows(outcomes, [(impossible, "cannot do w4a16")])
    assert [row.reason for row in found] == ["", "seed 1: Hessian of x stays singular", "cannot do w4a16"]
    table = as_table(found)
    assert table[1] == {
        "model": "m",
        "method": "gptq",
        "bits": "w3a16",
        "states": "noised",
        "reason": "seed 1: Hessian of x stays singular",
    }


def test_a_study_of_one_task_has_its_figures_only() -> None:
    cells = [full(), measured("gptq")]
    for _, found in cells:
        found["tasks"] = {"choice": found["tasks"]["choice"]}
    table = as_table(rows(cells, []))
    assert set(table[1]["measured"]) == {"choice", "choice.add", "margin"}
    assert table[1]["rank"] is None
