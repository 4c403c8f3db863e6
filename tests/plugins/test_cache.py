"""cache_update and attend: loops over rows and slots = torch = ONNX Runtime, however the nodes are written."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.plugins.conftest import Both, build_model, call_reference, open_session

F = np.float32
SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 2), st.integers(1, 12), st.integers(1, 5))


def drawn(seed: int, *shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal(shape).astype(F)


@pytest.mark.parametrize("scattered", [True, False])
@settings(max_examples=30)
@given(shape=SHAPES, data=st.data())
def test_new_ones_lie_in_their_slots_and_nothing_else_moves(
    scattered: bool, shape: tuple[int, int, int, int], data: st.DataObject
) -> None:
    batch, heads, slots, channels = shape
    query = data.draw(st.integers(1, slots))
    start = np.array([data.draw(st.integers(0, slots - query)) for _ in range(batch)])
    past, new = drawn(1, *shape), drawn(2, batch, heads, query, channels)
    expected = past.copy()
    for row in range(batch):
        expected[row, :, start[row] : start[row] + query] = new[row]
    inputs = {"past": past, "new": new, "write_start": start}
    attributes = {"scattered": scattered}
    assert np.array_equal(call_reference("cache_update", attributes, inputs)["y"], expected)
    assert np.array_equal(open_session(build_model("cache_update", attributes, inputs)).run(None, inputs)[0], expected)


def plain_row(q: np.ndarray[Any, Any], k: np.ndarray[Any, Any], v: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """One query over the slots that it sees, in float64."""
    score = k.astype(np.float64) @ q / np.sqrt(len(q))
    weight = np.exp(score - score.max())
    mixed: np.ndarray[Any, Any] = weight @ v / weight.sum()
    return mixed


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(("heads", "groups"), [(2, 2), (4, 2), (3, 1)])
@pytest.mark.parametrize("query", [1, 2, 7])
def test_nobody_attends_past_the_length_of_the_row(
    both: Both, masked: bool, heads: int, groups: int, query: int
) -> None:
    slots, channels, kv_len = 9, 8, np.array([9, 1, 5])
    q, k, v = (
        drawn(1, 3, heads, query, channels),
        drawn(2, 3, groups, slots, channels),
        drawn(3, 3, groups, slots, channels),
    )
    expected = np.empty(q.shape)
    for b, h, i in np.ndindex(3, heads, query):
        group = h // (heads // groups)
        expected[b, h, i] = plain_row(q[b, h, i], k[b, group, : kv_len[b]], v[b, group, : kv_len[b]])
    for found in both("attend", {"masked": masked}, {"q": q, "k": k, "v": v, "kv_len": kv_len}):
        np.testing.assert_allclose(found["y"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("query", [2, 16])
def test_both_ways_of_writing_them_give_the_same_bits(both: Both, query: int) -> None:
    q, k, v, kv_len = drawn(1, 2, 4, query, 8), drawn(2, 2, 2, 24, 8), drawn(3, 2, 2, 24, 8), np.array([20, 7])
    attended = [both("attend", {"masked": masked}, {"q": q, "k": k, "v": v, "kv_len": kv_len})[1] for masked in (0, 1)]
    assert np.array_equal(attended[0]["y"], attended[1]["y"])
