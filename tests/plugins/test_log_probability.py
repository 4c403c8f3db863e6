"""log_probability: textbook softmax = torch = ONNX Runtime body = onnx.reference, and it agrees with the record."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]
F = np.float32
# A float64 sum rounded once, and what cancels where ln p is near 0: a few roundings of logits up to 120 in float64.
RELATIVE, ABSOLUTE = 2.0**-23, 1e-12


def textbook(inputs: Arrays) -> NDArray[np.float64]:
    rows = (inputs["logits"] + inputs["logit_bias"]).astype(np.float64) * inputs["inv_temp"].astype(np.float64)[
        :, None, None
    ]
    found = np.zeros(inputs["target_ids"].shape)
    for place, target in np.ndenumerate(inputs["target_ids"]):
        row = rows[place]
        found[place] = row[target] - (row.max() + np.log(np.exp(row - row.max()).sum()))
    return found


def draw(batch: int, rows: int, vocabulary: int, spread: float) -> Arrays:
    rng = np.random.default_rng([batch, rows, vocabulary])
    return {
        "logits": (rng.standard_normal((batch, rows, vocabulary)) * spread).astype(F),
        "logit_bias": rng.standard_normal(vocabulary).astype(F),
        "inv_temp": rng.uniform(0.5, 2, batch).astype(F),
        "target_ids": rng.integers(0, vocabulary, (batch, rows)),
    }


def assert_near(found: NDArray[Any], expected: NDArray[Any]) -> None:
    assert found.dtype == F
    assert (np.abs(found - expected) <= RELATIVE * np.abs(expected) + ABSOLUTE).all()


@pytest.mark.parametrize("spread", [0.0, 1.0, 30.0])
@pytest.mark.parametrize(("batch", "rows", "vocabulary"), [(1, 1, 9), (3, 4, 50), (2, 1, 1000)])
def test_equals_textbook_and_body(batch: int, rows: int, vocabulary: int, spread: float, both: Any) -> None:
    inputs = draw(batch, rows, vocabulary, spread)
    expected = textbook(inputs)
    for found in both("log_probability", {}, inputs):
        assert_near(found["target_logp"], expected)
        assert np.array_equal(found["biased"], inputs["logits"] + inputs["logit_bias"])


@pytest.mark.parametrize("ban", [-np.inf, -1e9])
def test_banned_ids_count_for_nothing(ban: float, both: Any) -> None:
    inputs = draw(2, 3, 40, 2.0)
    inputs["logit_bias"][::2] = ban
    inputs["target_ids"] |= 1
    kept = {
        "logits": inputs["logits"][..., 1::2],
        "logit_bias": inputs["logit_bias"][1::2],
        "inv_temp": inputs["inv_temp"],
        "target_ids": inputs["target_ids"] // 2,
    }
    for found in both("log_probability", {}, inputs):
        assert_near(found["target_logp"], textbook(kept))
    inputs["target_ids"] -= 1
    for found in both("log_probability", {}, inputs):
        assert (found["target_logp"] < -1e8).all()
        assert not np.isnan(found["target_logp"]).any()


def test_the_best_id_is_as_likely_as_the_record_says() -> None:
    inputs = {name: torch.from_numpy(array) for name, array in draw(3, 4, 50, 5.0).items()}
    inputs["inv_temp"] = torch.ones(3)
    targets = inputs.pop("target_ids")
    ids, _, tail, *_ = torch.ops.dllmc.record(*inputs.values(), 1)
    found, _ = torch.ops.dllmc.log_probability(*inputs.values(), ids[..., 0])
    assert (found.exp() - 1 / (1 + tail)).abs().max() <= 2.0**-22
    assert not torch.equal(targets, ids[..., 0])


def test_onnx_reference_agrees(both: Any, by_onnx_reference: Callable[[str, dict[str, Any], Arrays], Arrays]) -> None:
    inputs = draw(2, 3, 40, 2.0)
    assert_near(by_onnx_reference("log_probability", {}, inputs)["target_logp"], textbook(inputs))
