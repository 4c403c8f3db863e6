"""Conversions to the same type, full slices, detaches and assertions go; everything that does something stays."""

import torch
from torch.fx import Node

from passes.clean_capture import FULL, CleanCapture
from tests.passes.sketch import Sketch, assert_untouched, aten, count, edited

X = torch.arange(12.0).reshape(3, 4)


def typed(node: Node, value: torch.Tensor) -> Node:
    """Give a node the example value that `torch.export` records."""
    node.meta["val"] = value
    return node


def test_what_changes_nothing_goes() -> None:
    sketch = Sketch()
    x = typed(sketch.input("x"), X)
    sketch(aten._assert_tensor_metadata.default, x, None, None, torch.float32)
    same = typed(sketch(aten.to.dtype, x, torch.float32), X)
    again = typed(sketch(aten.to.dtype, same, torch.float32), X)
    sliced = sketch(aten.slice.Tensor, again, 0, 0, FULL)
    graph = sketch.output(sketch(aten.neg.default, sketch(aten.detach.default, sliced)))
    clean, counts = edited(graph, CleanCapture())
    assert counts == [5]
    assert [node.op for node in clean.graph.nodes] == ["placeholder", "call_function", "output"]
    assert torch.equal(clean(X), graph(X))


def test_an_output_that_is_only_a_conversion_becomes_the_input() -> None:
    sketch = Sketch()
    x = typed(sketch.input("x"), X)
    graph = sketch.output(sketch(aten.to.dtype, x, torch.float32))
    clean, counts = edited(graph, CleanCapture())
    assert counts == [1]
    assert torch.equal(clean(X), X)


def test_conversions_and_slices_that_do_something_stay() -> None:
    sketch = Sketch()
    x = typed(sketch.input("x"), X)
    half = typed(sketch(aten.to.dtype, x, torch.float16), X.half())
    wide = sketch(aten.to.dtype, half, torch.float32)
    late = sketch(aten.slice.Tensor, wide, 0, 1, FULL)
    early = sketch(aten.slice.Tensor, late, 1, 0, 3)
    every_second = sketch(aten.slice.Tensor, early, 1, 0, FULL, 2)
    assert_untouched(sketch.output(every_second), CleanCapture())


def test_cleaning_twice_finds_nothing_more() -> None:
    sketch = Sketch()
    x = typed(sketch.input("x"), X)
    graph = sketch.output(sketch(aten.neg.default, sketch(aten.slice.Tensor, x, 1, 0, FULL)))
    clean, counts = edited(graph, CleanCapture())
    assert counts == [1]
    assert count(clean, aten.slice.Tensor) == 0
    assert_untouched(clean, CleanCapture())
