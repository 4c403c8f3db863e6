"""Rows of a study: all seeds of a method together, pairs with full precision, ranks only where methods differ."""

import pytest

from pipeline.metrics.bootstrap import paired
from pipeline.study.grid import FULL, Cell, Grid
from pipeline.study.summary import as_table, figures, ranks, rows
from tests.pipeline.study.outcomes import SAMPLES, STEPS, full, measured, outcome


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
    assert found["free_tokens.1"].mean == found["forced_tokens.3"].mean == 0.5
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
    assert 0.09 < expected.low < 0.15  # of the seeds: their bits are 0.1, 0.2 and 0.3 more
    assert 0.25 < expected.high < 0.31


def test_what_full_precision_has_not_has_an_interval_of_its_own() -> None:
    cells = [full(), *(measured("gptq", seed=seed, right=0.5) for seed in range(2))]
    found = as_table(rows(cells, []))[1]["measured"]
    for name in ("kl", "argmax", "same_answers", "same_tokens", "same_steps", "forced", "free_mse"):
        assert "against_full" not in found[name]
        bounds = found[name]["interval"]
        assert bounds["low"] - 1e-12 <= found[name]["mean"] <= bounds["high"] + 1e-12, name
    assert found["same_answers"]["interval"]["low"] == pytest.approx(0.35, abs=0.05)
    assert found["same_answers"]["interval"]["high"] == pytest.approx(0.65, abs=0.05)
    assert "interval" not in found["nll"]


def test_first_divergences_are_counted_over_all_seeds() -> None:
    cells = [full(), *(measured("gptq", seed=seed, right=0.5) for seed in range(2))]
    reference, row = as_table(rows(cells, []))
    assert row["first_divergence"] == {"1": SAMPLES, "never": SAMPLES}
    assert "first_divergence" not in reference


def test_masks_left_are_a_mean_over_runs_and_seeds() -> None:
    """Two positions of four are written at step 1; a run of the second seed writes all at step 3."""
    cells = [full(), *(measured("gptq", seed=seed) for seed in range(2))]
    cells[2][1]["tasks"]["match"]["run"]["steps"] = [[3] * 4] * SAMPLES
    reference, row = as_table(rows(cells, []))
    assert reference["masks_left"] == [4.0, 2.0]
    assert row["masks_left"] == [4.0, 3.0, 2.0]


def test_ranks_know_that_seeds_differ() -> None:
    """Each seed of one is better than one and worse than another of the other; of samples alone all are apart."""
    cells = [full()]
    for method, shifts in (("flatquant", (0.2, 0.4, 0.15)), ("freeact", (0.3, 0.22, 0.32))):
        cells += [measured(method, seed=seed, nll=nll) for seed, nll in enumerate(shifts)]
    assert ranks(rows(cells, [])) == {1: 1, 2: 1}


def test_a_row_tells_its_recipe() -> None:
    grid = Grid(methods=("gptq",), bits=("w4a16",), seeds={"w4a16": 1}, sets=("gptq.damping=0.02",))
    cell, outcome_ = measured("gptq", "w4a16")
    line = as_table(rows([full(), (cell, outcome_)], [], {cell: grid.recipe(cell)}))[1]["recipe"]
    assert line["method"] == "gptq"
    assert line["gptq"] == {"damping": 0.02, "block": 128, "act_order": True}
    assert line["linear"]["w_group"] == 128
    assert (line["calibration"]["samples"], line["calibration"]["source"]) == (128, "builtin")
    assert "seed" not in line["calibration"]
    assert "generation" not in line


def test_free_runs_that_end_at_other_steps_are_joined_where_all_are() -> None:
    short = measured("gptq", seed=1)
    for name in ("by_step", "power"):
        del short[1]["tasks"]["trajectory"]["free"][name][-1]
    row = rows([full(), measured("gptq"), short], [])[1]
    assert f"free.{STEPS}" not in row.sums
    assert f"forced.{STEPS}" in row.sums


def test_variants_have_rows_of_their_own_and_are_compared_with_the_first() -> None:
    cells = [full(), measured("quarot", nll=0.4)]
    for variant, shift in (("whole", 0.0), ("no TAC", 0.1)):
        cells += [measured("star", seed=seed, nll=0.2 + shift, variant=variant) for seed in range(2)]
    cells += [full("other"), measured("quarot", model="other")]
    found = rows(cells, [])
    assert [(row.method, row.variant, row.seeds) for row in found[2:4]] == [
        ("star", "whole", (0, 1)),
        ("star", "no TAC", (0, 1)),
    ]
    table = as_table(found)
    assert [line.get("variant") for line in table] == [None, None, "whole", "no TAC", None, None]
    whole, bare = table[2]["measured"], table[3]["measured"]
    assert not any("against_first" in value for at in (0, 2, 4, 5) for value in table[at]["measured"].values())
    assert bare["nll"]["against_first"] == vars(paired(found[2].sums["nll"], found[3].sums["nll"]))
    assert bare["nll"]["against_first"]["difference"] == pytest.approx(0.1, abs=1e-6)
    assert {"nll", "kl", "match", "same_tokens", "forced", "forced_mse.3", "free_tokens.1"} <= {
        name for name, value in bare.items() if "against_first" in value
    }
    assert table[1]["measured"]["nll"]["against_first"]["low"] > 0  # a method beside the variants
    assert whole["nll"]["mean"] < bare["nll"]["mean"]


def test_steps_that_only_one_run_took_are_not_compared() -> None:
    short = measured("star", variant="short")
    free = short[1]["tasks"]["trajectory"]["free"]
    free["power"][-1]["values"][0] = free["by_step"][-1]["weights"][0] = 0.0
    cells = [full(), measured("star", variant="whole"), short]
    found = as_table(rows(cells, []))[2]["measured"]
    assert not any("against_first" in found[f"{name}.{STEPS}"] for name in ("free", "free_mse"))
    assert "against_first" in found[f"forced.{STEPS}"]


def test_a_first_variant_that_failed_leaves_nothing_to_compare_with() -> None:
    failed = Cell(model="m", method="star", bits="w4a4", states="noised", variant="whole")
    cells = [full(), (failed, {"tasks": {}, "failed": "singular"}), measured("star", variant="no TAC")]
    table = as_table(rows(cells, []))
    assert (table[1]["variant"], table[1]["reason"]) == ("whole", "seed 0: singular")
    assert not any("against_first" in value for value in table[2]["measured"].values())


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
