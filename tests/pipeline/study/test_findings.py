"""Findings: each claim is judged by what was measured, and by nothing that was not."""

import pytest

from pipeline.study.findings import CLAIMS, differences, findings
from pipeline.study.grid import BITS, Grid
from pipeline.study.summary import Row, rows
from tests.pipeline.study.outcomes import full, measured, outcome


def verdicts(*cells: Row) -> dict[str, str]:
    found = findings(cells)
    assert [each["claim"] for each in found] == [claim.text for claim in CLAIMS]
    return {str(each["claim"]): str(each["verdict"]) for each in found if each["verdict"] != "not measured"}


ROTATION, FAILS, DUQUANT, GPTQ, POINT, W8A8, W3 = (claim.text for claim in CLAIMS)


def test_nothing_is_found_where_nothing_was_measured() -> None:
    assert verdicts() == {}
    assert verdicts(*rows([full()], [])) == {}


@pytest.mark.parametrize(
    ("quarot", "duquant", "verdict"), [(0.2, 0.3, "agrees"), (0.2, 0.9, "mixed"), (2, 3, "disagrees")]
)
def test_rotation_is_compared_with_smoothquant(quarot: float, duquant: float, verdict: str) -> None:
    cells = [
        full(),
        measured("smoothquant", nll=0.6, right=0.025),
        measured("quarot", nll=quarot),
        measured("duquant", nll=duquant),
        measured("smoothquant", nll=0.01, states="clean", right=0.025),  # other states: no pair
    ]
    found = verdicts(*rows(cells, []))
    assert found == {ROTATION: verdict, FAILS: "agrees", DUQUANT: "disagrees"}


def test_a_variant_says_nothing_of_a_method() -> None:
    cells = [full(), measured("smoothquant", nll=0.6, right=0.025), measured("quarot", nll=2.0, variant="half")]
    assert verdicts(*rows(cells, [])) == {FAILS: "agrees"}


def test_equal_methods_are_not_better_but_not_worse() -> None:
    """Their draws differ, so the interval holds 0 within."""
    cells = [
        full(),
        measured("duquant", seed=1),
        measured("quarot", seed=3),
        measured("smoothquant", seed=4, right=0.5),
    ]
    assert verdicts(*rows(cells, [])) == {ROTATION: "disagrees", FAILS: "disagrees", DUQUANT: "agrees"}


def test_weights_alone_are_compared_at_both_bits() -> None:
    cells = [
        full(),
        *(measured("gptq", bits, nll=0.2) for bits in ("w4a16", "w3a16")),
        measured("awq", "w4a16", nll=0.3),
        measured("awq", "w3a16", nll=0.1),
    ]
    assert verdicts(*rows(cells, []))[GPTQ] == "mixed"


@pytest.mark.parametrize(("method", "bits", "claim"), [("rtn", "w8a8", W8A8), ("gptq", "w4a16", POINT)])
def test_exact_match_is_held_to_one_point(method: str, bits: str, claim: str) -> None:
    cells = [full(), measured(method, bits), full("n"), measured(method, bits, model="n", right=0.5)]
    cells += [measured("awq", "w4a16", right=0.1)]  # nobody said this of AWQ
    found = next(each for each in findings(rows(cells, [])) if each["claim"] == claim)
    assert (found["verdict"], found["held"], found["of"]) == ("mixed", 1, 2)
    assert found["figures"] == [f"m {method} {bits} noised: +0.0 points [+0.0, +0.0]", found["figures"][1]]
    assert str(found["figures"][1]).startswith(f"n {method} {bits} noised: -50.0 points [")


def test_few_samples_settle_nothing() -> None:
    """One of 40 is lost: perhaps nothing, perhaps more than a point or 4 %."""
    cells = [full(), measured("rtn", "w8a8", right=0.975), measured("rtn", "w3a16", right=0.975)]
    assert verdicts(*rows(cells, [])) == {W8A8: "not settled", W3: "not settled"}
    cells.append(measured("gptq", "w8a8"))  # one that holds beside one that is open
    found = next(each for each in findings(rows(cells, [])) if each["claim"] == W8A8)
    assert (found["verdict"], found["held"], found["open"], found["of"]) == ("not settled", 1, 1, 2)


def test_a_difference_that_seeds_do_not_bear_out_is_not_settled() -> None:
    """Their means differ by 0.03, seeds of one method by 0.25."""
    cells = [full(), *(measured("duquant", seed=n, nll=nll) for n, nll in enumerate((0.2, 0.4, 0.15)))]
    cells += [measured("quarot", seed=n, nll=nll) for n, nll in enumerate((0.3, 0.22, 0.32))]
    assert verdicts(*rows(cells, [])) == {DUQUANT: "not settled"}
    cells += [measured("smoothquant", seed=n, nll=nll) for n, nll in enumerate((0.1, 0.5, 0.3))]
    assert verdicts(*rows(cells, []))[ROTATION] == "not settled"


@pytest.mark.parametrize(("right", "verdict"), [(0.475, "not settled"), (0.2, "agrees"), (0.5, "disagrees")])
def test_drops_are_shares_of_full_precision(right: float, verdict: str) -> None:
    """2.5 points of 50 are 5 %."""
    reference = full()
    reference[1]["tasks"]["match"]["score"] |= outcome(right=0.5)["tasks"]["match"]["score"]
    found = findings(rows([reference, measured("rtn", "w3a16", right=right)], []))[-1]
    assert found["verdict"] == verdict
    assert str(found["figures"]).startswith(f"['m rtn w3a16 noised: {100 * (right - 0.5) / 0.5:+.1f} % [")


@pytest.mark.parametrize(("right", "known"), [(0.0, False), (0.175, False), (0.2, True)])
def test_a_model_that_knows_nothing_says_nothing_of_exact_match(right: float, known: bool) -> None:
    reference = full()
    reference[1]["tasks"]["match"]["score"] |= outcome(right=right)["tasks"]["match"]["score"]
    cells = [reference, measured("smoothquant", right=0.0)]
    cells += [measured("rtn", bits, right=0.0) for bits in ("w8a8", "w3a16")]
    assert set(verdicts(*rows(cells, []))) == ({FAILS, W8A8, W3} if known else set())


def test_a_finding_tells_what_differs_in_our_setting() -> None:
    names = ("smoothquant", "quarot", "duquant", "gptq", "rtn")
    sets = ("duquant.a_clip=0.8", "calibration.samples=64")
    grid = Grid(methods=names, bits=("w4a4", "w4a16", "w8a8"), seeds=dict.fromkeys(BITS, 1), sets=sets)
    cells = [full(), *(measured(name, nll=nll) for name, nll in zip(names[:3], (0.9, 0.3, 0.2), strict=True))]
    cells += [measured("gptq", "w4a16"), measured("rtn", "w8a8", states="")]
    found = findings(rows(cells, [], {cell: grid.recipe(cell) for cell, _ in cells[1:]}))
    why = {str(each["claim"]): "\n".join(map(str, each["why"])) for each in found if each["of"]}
    rotation = why[ROTATION]
    assert "the study by accuracy of tasks" in rotation
    assert "activations asymmetric per token, weights symmetric per channel; the study's activations asym" in rotation
    assert "quarot w4a4: activations symmetric per token, weights symmetric per channel, as the study's" in rotation
    assert "attention with K at 16 and V at 16 bits, the study's Q, K and V at 4" in rotation
    assert "duquant w4a4: duquant.a_clip 0.8, the study's 0.9" in rotation
    assert "\nLM head at 8 bits, the study's at 16" in rotation  # all rows: not named
    assert "\ncalibrated on 64 noised canvases of builtin text, the study on 128 of clean text" in rotation
    assert "weights asymmetric in groups of 128, as the study's" in why[POINT]
    assert "weights symmetric per channel; not in the study" in why[W8A8]
    assert "calibrated" not in why[W8A8]
    assert "exact match" in why[FAILS]


def test_a_setting_that_is_the_study_s_differs_by_nothing_else() -> None:
    sets = ("attention.k_bits=4", "attention.v_bits=4", "head.bits=16")
    grid = Grid(methods=("quarot",), bits=("w4a4",), seeds={"w4a4": 1}, sets=sets)
    cell, found = measured("quarot")
    (_, row) = rows([full(), (cell, found)], [], {cell: grid.recipe(cell)})
    grids, calibration = differences(row)
    assert grids.endswith(", as the study's")
    assert calibration.startswith("calibrated on ")
