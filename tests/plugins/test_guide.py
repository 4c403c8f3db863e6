"""guide: LLaDA's formula on pairs of rows = torch = ONNX Runtime body; without strength nothing changes."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]
F = np.float32


def draw(pairs: int, strength: float) -> Arrays:
    rng = np.random.default_rng(pairs)
    return {
        "logits": (rng.standard_normal((2 * pairs, 3, 40)) * 5).astype(F),
        "inv_temp": np.repeat(rng.uniform(0.5, 2, pairs).astype(F), 2),
        "guidance": np.full(pairs, strength, F),
    }


@pytest.mark.parametrize("pairs", [1, 3])
@pytest.mark.parametrize("strength", [0.5, 2.0])
def test_equals_the_formula(pairs: int, strength: float, both: Any) -> None:
    inputs = draw(pairs, strength)
    conditional, unconditional = inputs["logits"][::2].astype(np.float64), inputs["logits"][1::2].astype(np.float64)
    expected = unconditional + (strength + 1) * (conditional - unconditional)
    for found in both("guide", {}, inputs):
        assert found["guided"].dtype == F
        # A difference, a product and a sum in float32, of numbers up to 20 (w + 1).
        assert np.abs(found["guided"] - expected).max() <= 3 * 2.0**-24 * 40 * (strength + 1)
        assert np.array_equal(found["first"], inputs["inv_temp"][::2])


def test_without_strength_the_prompt_s_row_stays_as_it_is(both: Any) -> None:
    inputs = draw(2, 0.0)
    for found in both("guide", {}, inputs):
        assert np.array_equal(found["guided"], inputs["logits"][::2])


def test_pairs_have_strengths_of_their_own(both: Any) -> None:
    inputs = draw(3, 1.0)
    inputs["guidance"] = np.array([0.0, 1.0, 3.0], F)
    whole = both("guide", {}, inputs)
    for pair in range(3):
        alone = {
            "logits": inputs["logits"][2 * pair : 2 * pair + 2],
            "inv_temp": inputs["inv_temp"][2 * pair : 2 * pair + 2],
            "guidance": inputs["guidance"][pair : pair + 1],
        }
        for found, single in zip(whole, both("guide", {}, alone), strict=True):
            assert np.array_equal(found["guided"][pair], single["guided"][0])


def test_onnx_reference_agrees(both: Any, by_onnx_reference: Callable[[str, dict[str, Any], Arrays], Arrays]) -> None:
    inputs = draw(2, 0.75)
    reference, _ = both("guide", {}, inputs)
    found = by_onnx_reference("guide", {}, inputs)
    assert np.array_equal(found["guided"], reference["guided"])
