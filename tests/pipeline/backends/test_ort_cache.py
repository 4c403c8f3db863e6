"""Which graphs have a cache, and the memory that passes share."""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from pipeline.backends.eager import EagerSession
from pipeline.backends.ort_cache import Layout, OrtCache, Part, Scratch, layout_of
from pipeline.errors import InputRefused, WillNotFit

FLOAT = "tensor(float)"


@dataclass
class Value:
    """An input or output as ONNX Runtime describes it."""

    name: str
    type: str = FLOAT
    shape: tuple[Any, ...] = ("batch", 2, "slots", 16)


IDS = Value("input_ids", "tensor(int64)", ("batch", "query"))
PASTS = [IDS, Value("past_k_0"), Value("past_v_0", shape=("batch", 2, "slots", 8))]


@pytest.mark.parametrize(("stem", "in_place"), [("present", True), ("present_window", False)])
def test_parts_follow_from_the_signature(stem: str, in_place: bool) -> None:
    outputs = [Value("tail"), Value(f"{stem}_k_0"), Value(f"{stem}_v_0")]
    layout = layout_of(PASTS, outputs, "model.onnx")
    assert layout.in_place == in_place
    assert layout.parts == (
        Part("past_k_0", f"{stem}_k_0", np.float32, 2, 16),
        Part("past_v_0", f"{stem}_v_0", np.float32, 2, 8),
    )
    assert [part.kind for part in layout.parts] == ["past_k", "past_v"]
    cache = OrtCache(layout, 3, 32)
    assert {name: array.shape for name, array in cache.arrays.items()} == {
        "past_k_0": (3, 2, 32, 16),
        "past_v_0": (3, 2, 32, 8),
    }
    assert cache.size_bytes == 3 * 2 * 32 * (16 + 8) * 4
    assert not any(array.any() for array in cache.arrays.values())


@pytest.mark.parametrize(
    ("inputs", "outputs", "reason"),
    [
        ([IDS], ["tail"], "no inputs past_"),
        (PASTS, ["present_k_0"], "past_v_0 .* comes out in .*present_k_0.* expected .* present_v_0"),
        (PASTS, ["present_k_0", "present_window_v_0"], "present_window_k_0"),
        ([Value("past_k_0", "tensor(float16)")], ["present_k_0"], r"tensor\(float16\)"),
        ([Value("past_k_0", shape=("batch", "heads", "slots", 16))], ["present_k_0"], "'heads'"),
        ([Value("past_k_0", shape=("batch", 16))], ["present_k_0"], "expected .*slots, width"),
    ],
)
def test_another_signature_is_refused(inputs: list[Value], outputs: list[str], reason: str) -> None:
    with pytest.raises(InputRefused, match=reason):
        layout_of(inputs, [Value(name) for name in outputs], "model.onnx")


def test_what_does_not_fit_the_memory_is_refused() -> None:
    layout = Layout((Part("past_k_0", "present_k_0", np.float32, 1 << 11, 1 << 11),), in_place=True)
    with pytest.raises(WillNotFit, match=r"8192 rows of 8192 slots"):
        OrtCache(layout, 8192, 8192)
    with pytest.raises(WillNotFit, match="not enough memory"):
        Scratch().array("k", (1 << 24, 1 << 24), np.float32)


def test_windows_are_placed_in_their_rows_and_slots_and_nowhere_else() -> None:
    layout = Layout((Part("past_k_0", "present_window_k_0", np.float32, 2, 3),), in_place=False)
    cache = OrtCache(layout, 4, 10)
    window = np.random.default_rng(0).random((2, 2, 4, 3), dtype=np.float32) + 1
    cache.place({"present_window_k_0": window}, 1, np.array([6, 1]))
    expected = np.zeros((4, 2, 10, 3), np.float32)
    expected[1, :, 6:10], expected[2, :, 1:5] = window
    assert np.array_equal(cache.arrays["past_k_0"], expected)


@pytest.mark.parametrize(
    ("first_row", "write_start", "reason"),
    [
        (0, [0, 6], None),
        (2, [6, 0], None),
        (3, [0, 0], "rows 3 to 5 .* 4 rows"),
        (-1, [0, 0], "rows -1 to 1"),
        (0, [0, 7], "slots 0 to 11; the cache has 0 to 10"),
        (0, [7, 0], "slots 0 to 11"),
        (0, [2, -1], "slots -1 to 6"),
    ],
)
def test_a_pass_stays_in_its_cache(first_row: int, write_start: list[int], reason: str | None) -> None:
    cache = OrtCache(Layout((), in_place=True), 4, 10)
    with nullcontext() if reason is None else pytest.raises(ValueError, match=reason):
        cache.check(first_row, 2, np.array(write_start), 4)


def test_scratch_grows_and_does_not_shrink() -> None:
    scratch = Scratch()
    first = scratch.array("k", (2, 8), np.float32)
    assert scratch.array("k", (3, 2), np.float32).ctypes.data == first.ctypes.data
    assert scratch.array("v", (3, 2), np.float32).ctypes.data != first.ctypes.data
    assert scratch.array("k", (9, 9), np.float32).shape == (9, 9)
    assert scratch.memory["k"].size == 81


def test_a_torch_graph_has_none() -> None:
    session = EagerSession(lambda *_: (), top_k=8)
    assert not session.cached
    with pytest.raises(ValueError, match="keeps no keys and values"):
        session.allocate(1, 16)
