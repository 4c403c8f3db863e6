"""record and head: textbook definitions = torch = ONNX Runtime body."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]
F = np.float32
# Sums of float64 terms rounded once: the neighbour of the right float32, plus what 1 + tail loses in float64.
RELATIVE, ABSOLUTE = 2.0**-22, 1e-15


def textbook(logits: NDArray[Any], bias: NDArray[Any], inv_temp: NDArray[Any], top_k: int) -> Arrays:
    rows = logits + bias
    found: dict[str, list[Any]] = {name: [] for name in ("top_ids", "top_logits", "tail", "neg_entropy", "lse_t")}
    for batch, warm in zip(rows, inv_temp, strict=True):
        for row in batch:
            order = sorted(range(len(row)), key=lambda i: (-row[i], i))
            z = row.astype(np.float64) - float(row[order[0]])
            p = np.exp(z) / np.exp(z).sum()
            found["top_ids"].append(order[:top_k])
            found["top_logits"].append(row[order[:top_k]])
            found["tail"].append(sum(float(np.exp(z[i])) for i in order[1:]))
            found["neg_entropy"].append(sum(float(x * np.log(x)) for x in p if x > 0))
            hot = row.astype(np.float64) * float(warm)
            found["lse_t"].append(hot.max() + np.log(np.exp(hot - hot.max()).sum()))
    lead = logits.shape[:2]
    return {
        name: np.array(values).reshape((*lead, top_k) if name.startswith("top") else lead)
        for name, values in found.items()
    }


def assert_near(found: Arrays, expected: Arrays) -> None:
    assert np.array_equal(found["top_ids"], expected["top_ids"])
    assert np.array_equal(found["top_logits"], expected["top_logits"])
    for name in ("tail", "neg_entropy", "lse_t"):
        assert found[name].dtype == F
        assert (np.abs(found[name] - expected[name]) <= RELATIVE * np.abs(expected[name]) + ABSOLUTE).all(), name


def draw(batch: int, rows: int, vocabulary: int, spread: float) -> Arrays:
    rng = np.random.default_rng([batch, rows, vocabulary])
    return {
        "logits": (rng.standard_normal((batch, rows, vocabulary)) * spread).astype(F),
        "logit_bias": np.zeros(vocabulary, dtype=F),
        "inv_temp": rng.uniform(0.5, 2, batch).astype(F),
    }


@pytest.mark.parametrize("spread", [0.0, 1.0, 30.0])
@pytest.mark.parametrize(("batch", "rows", "vocabulary"), [(1, 1, 9), (3, 4, 50), (2, 1, 1000)])
def test_equals_textbook_and_body(batch: int, rows: int, vocabulary: int, spread: float, both: Any) -> None:
    """Spread 0 is all ties: the ids must come in ascending order."""
    inputs = draw(batch, rows, vocabulary, spread)
    reference, body = both("record", {"top_k": 8}, inputs)
    assert_near(reference, textbook(*inputs.values(), top_k=8))
    assert_near(body, reference)


def test_ties_prefer_the_lower_id(both: Any) -> None:
    logits = np.array([[[1, 3, 2, 3, 2, 0]]], dtype=F)
    inputs = {"logits": logits, "logit_bias": np.zeros(6, F), "inv_temp": np.ones(1, F)}
    for found in both("record", {"top_k": 4}, inputs):
        assert found["top_ids"].tolist() == [[[1, 3, 2, 4]]]


@pytest.mark.parametrize("ban", [-np.inf, -1e30])
def test_banned_ids_count_for_nothing(ban: float, both: Any) -> None:
    inputs = draw(2, 3, 40, 2.0)
    inputs["logit_bias"][::2] = ban
    kept = {**inputs, "logits": inputs["logits"][..., 1::2], "logit_bias": inputs["logit_bias"][1::2]}
    expected = textbook(*kept.values(), top_k=5)
    expected["top_ids"] = expected["top_ids"] * 2 + 1
    for found in both("record", {"top_k": 5}, inputs):
        assert_near(found, expected)


def test_a_tiny_tail_is_not_lost(both: Any) -> None:
    inputs = {"logits": np.array([[[0, -60, -60]]], F), "logit_bias": np.zeros(3, F), "inv_temp": np.ones(1, F)}
    for found in both("record", {"top_k": 1}, inputs):
        assert abs(float(found["tail"][0, 0]) / (2 * np.exp(-60.0)) - 1) <= 1e-6


@pytest.mark.parametrize("inner", [64, 2048])
def test_head_is_linear_then_record(inner: int, both: Any) -> None:
    """2048 columns of 8-bit products exceed what float32 sums exactly."""
    rng = np.random.default_rng(inner)
    inputs = {
        "codes": rng.integers(-127, 128, (2, 3, inner)).astype(np.int8),
        "scale": rng.uniform(0.01, 0.02, (2, 3, 1)).astype(F),
        "weight": rng.integers(-127, 128, (50, inner)).astype(np.int8),
        "w_scale": rng.uniform(1e-4, 2e-4, (50, 1)).astype(F),
        "logit_bias": rng.standard_normal(50).astype(F),
        "inv_temp": np.array([0.7, 1.3], dtype=F),
    }
    acc = inputs["codes"].astype(np.int64) @ inputs["weight"].astype(np.int64).T
    logits = acc.astype(F) * inputs["w_scale"][:, 0] * inputs["scale"]
    reference, body = both("head", {"top_k": 8}, inputs)
    assert_near(reference, textbook(logits, inputs["logit_bias"], inputs["inv_temp"], 8))
    assert_near(body, reference)


def test_onnx_reference_agrees(both: Any, by_onnx_reference: Callable[[str, dict[str, Any], Arrays], Arrays]) -> None:
    inputs = draw(2, 3, 40, 2.0)
    reference, _ = both("record", {"top_k": 4}, inputs)
    assert_near(by_onnx_reference("record", {"top_k": 4}, inputs), reference)
