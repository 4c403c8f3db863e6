"""Findings: each claim is judged by what was measured, and by nothing that was not."""

import pytest

from pipeline.study.findings import CLAIMS, findings
from pipeline.study.summary import Row, rows
from tests.pipeline.study.outcomes import full, measured


def verdicts(*cells: Row) -> dict[str, str]:
    found = findings(cells)
    assert [each["claim"] for each in found] == [claim.text for claim in CLAIMS]
    return {str(each["claim"]): str(each["verdict"]) for each in found if each["verdict"] != "not measured"}


ROTATION, FAILS, DUQUANT, GPTQ, W8A8, W3 = (claim.text for claim in CLAIMS)


def test_nothing_is_found_where_nothing_was_measured() -> None:
    assert verdicts() == {}
    assert verdicts(*rows([full()], [])) == {}


@pytest.mark.parametrize(
    ("quarot", "duquant", "verdict"), [(0.2, 0.3, "agrees"), (0.2, 0.9, "mixed"), (2, 3, "disagrees")]
)
def test_rotation_is_compared_with_smoothquant(quarot: float, duquant: float, verdict: str) -> None:
    cells = [
        full(),
        measured("smoothquant", nll=0.6, right=0.05),
        measured("quarot", nll=quarot),
        measured("duquant", nll=duquant),
        measured("smoothquant", nll=0.01, states="clean", right=0.05),  # other states: no pair
    ]
    found = verdicts(*rows(cells, []))
    assert found == {ROTATION: verdict, FAILS: "agrees", DUQUANT: "disagrees"}


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
        *(measured("gptq", bits, nll=0.2, right=0.9) for bits in ("w4a16", "w3a16")),
        measured("awq", "w4a16", nll=0.3, right=0.9),
        measured("awq", "w3a16", nll=0.1, right=0.975),
    ]
    assert verdicts(*rows(cells, [])) == {GPTQ: "mixed", W3: "mixed"}


def test_w8a8_is_held_to_one_point() -> None:
    cells = [
        full(),
        measured("rtn", "w8a8", states=""),
        full("n"),
        measured("rtn", "w8a8", states="", model="n", right=0.9),
    ]
    found = next(each for each in findings(rows(cells, [])) if each["claim"] == W8A8)
    assert (found["verdict"], found["held"], found["of"]) == ("mixed", 1, 2)
    assert found["figures"] == ["m rtn w8a8: +0.0 points [+0.0, +0.0]", found["figures"][1]]
    assert str(found["figures"][1]).startswith("n rtn w8a8: -10.0 points [")
