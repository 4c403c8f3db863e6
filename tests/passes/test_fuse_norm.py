"""A quantiser takes its norm in; the norm itself stays for whoever else reads it."""

import torch
from torch.fx import GraphModule

from passes.fuse_norm import FuseNorm
from passes.graph import attributes
from tests.passes.lockstep import assert_same_codes
from tests.passes.sketch import Sketch, assert_untouched, aten, count, edited, only, ops

K, EPS = 32, 1e-3


def normed(
    *, bits: int = 4, symmetric: bool = True, group: int = 0, quantisers: int = 1, reader: bool = False
) -> GraphModule:
    sketch = Sketch()
    weight = sketch.weight("norm.weight", torch.rand(K) + 0.5)
    norm = sketch(aten.rms_norm.default, sketch.input("x"), [K], weight, EPS)
    numbers = (bits, symmetric, group, 1.0, 1.0, 0.0, 0, 0)
    results = [sketch(ops.quantize.default, norm, *[None] * 7, *numbers) for _ in range(quantisers)]
    if reader:
        results.append(sketch(aten.neg.default, norm))
    return sketch.output(*results)


def test_norm_moves_in_and_codes_agree() -> None:
    for bits, symmetric, group in ((4, True, 0), (4, False, 8), (8, True, 16), (8, False, 0)):
        graph = normed(bits=bits, symmetric=symmetric, group=group)
        fused, counts = edited(graph, FuseNorm())
        assert counts == [1]
        assert (count(graph, aten.rms_norm.default), count(fused, aten.rms_norm.default)) == (1, 0)
        call = only(fused, ops.quantize.default)
        assert str(call.args[1]) == "norm_weight"
        assert call.args[8:] == (bits, symmetric, group, 1.0, 1.0, EPS, 0, 0)
        x = torch.randn(3, 5, K) * torch.logspace(-2, 2, 5)[:, None]
        y = torch.nn.functional.rms_norm(x, (K,), attributes(graph)["norm.weight"], EPS)
        assert_same_codes(fused(x), graph(x), y, limit=2 ** (bits - 1) - 1, group=group)


def test_two_quantisers_of_one_norm_both_take_it() -> None:
    fused, counts = edited(normed(quantisers=2), FuseNorm())
    assert counts == [2]
    assert count(fused, aten.rms_norm.default) == 0


def test_norm_read_by_another_stays_for_it() -> None:
    graph = normed(reader=True)
    fused, counts = edited(graph, FuseNorm())
    assert counts == [1]
    assert count(fused, aten.rms_norm.default) == 1
    x = torch.randn(2, K)
    assert torch.equal(fused(x)[1], graph(x)[1])


def test_a_second_run_finds_nothing() -> None:
    fused, _ = edited(normed(), FuseNorm())
    assert_untouched(fused, FuseNorm())


def test_a_quantiser_without_a_norm_is_left_alone() -> None:
    sketch = Sketch()
    numbers = (4, True, 0, 1.0, 1.0, 0.0, 0, 0)
    assert_untouched(sketch.output(sketch(ops.quantize.default, sketch.input("x"), *[None] * 7, *numbers)), FuseNorm())


def test_a_quantiser_with_a_norm_of_its_own_takes_no_second() -> None:
    sketch = Sketch()
    weight = sketch.weight("norm.weight", torch.ones(K))
    norm = sketch(aten.rms_norm.default, sketch.input("x"), [K], weight, EPS)
    numbers = (4, True, 0, 1.0, 1.0, EPS, 0, 0)
    assert_untouched(sketch.output(sketch(ops.quantize.default, norm, weight, *[None] * 6, *numbers)), FuseNorm())


def test_a_norm_without_weight_or_over_more_axes_is_left_alone() -> None:
    for shape, weighted in (([K], False), ([3, K], True)):
        sketch = Sketch()
        x = sketch.input("x")
        weight = sketch.weight("norm.weight", torch.ones(*shape)) if weighted else None
        norm = sketch(aten.rms_norm.default, x, shape, weight, EPS)
        numbers = (4, True, 0, 1.0, 1.0, 0.0, 0, 0)
        graph = sketch.output(sketch(ops.quantize.default, norm, *[None] * 7, *numbers))
        assert_untouched(graph, FuseNorm())
