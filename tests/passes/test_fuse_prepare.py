"""A quantiser takes in what is done to its input first: transform, gate, and then the norm before them."""

import torch
from torch.fx import GraphModule, Node

from passes.fuse_norm import FuseNorm
from passes.fuse_prepare import FusePrepare
from passes.graph import node_of
from tests.passes.sketch import Sketch, assert_untouched, aten, count, edited, only, ops

K, EPS = 24, 1e-3


def prepared(*, gate: bool = False, norm: bool = False, quantisers: int = 1) -> GraphModule:
    sketch = Sketch()
    x, state = sketch.input("x"), sketch.input("state")
    if norm:
        x = sketch(aten.rms_norm.default, x, [K], sketch.weight("norm.weight", torch.rand(K) + 0.5), EPS)
    left, right = (sketch.weight(name, torch.randn(size, size)) for name, size in (("left", 4), ("right", 6)))
    given: tuple[Node | None, ...] = (None, None, None, None, left, right, state if gate else None)
    numbers = (0.25, 1, 2) if gate else ()
    values = sketch(ops.prepare.default, x, *given, *numbers)
    grid = (4, False, 8, 0.9, 0.8, 0.0, 0, 0)
    return sketch.output(*(sketch(ops.quantize.default, values, *[None] * 7, *grid) for _ in range(quantisers)))


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(3, 5, K), torch.randint(2, (3, 5), dtype=torch.int32)


def test_codes_are_the_same_to_the_bit() -> None:
    for gate in (False, True):
        graph = prepared(gate=gate)
        fused, counts = edited(graph, FusePrepare())
        assert counts == [1]
        assert count(fused, ops.prepare.default) == 0
        given = inputs()
        for found, expected in zip(fused(*given), graph(*given), strict=True):
            assert torch.equal(found, expected)
    call = only(fused, ops.quantize.default)
    assert call.args[8:] == (4, False, 8, 0.9, 0.8, 0.25, 1, 2)  # the grid in its place, then eps and the gate
    assert [str(node_of(value)) for value in call.args[5:8]] == ["left", "right", "state"]


def test_the_norm_before_them_goes_in_too() -> None:
    graph = prepared(gate=True, norm=True)
    fused, counts = edited(graph, FusePrepare(), FuseNorm())
    assert counts == [1, 1]
    assert count(fused, aten.rms_norm.default) == 0
    call = only(fused, ops.quantize.default)
    assert (str(call.args[1]), call.args[13]) == ("norm_weight", EPS)
    given = inputs()
    for found, expected in zip(fused(*given)[1:], graph(*given)[1:], strict=True):
        torch.testing.assert_close(found, expected)  # codes may differ where a value lies at a half


def test_what_others_read_stays() -> None:
    assert_untouched(prepared(quantisers=2), FusePrepare())
    assert_untouched(edited(prepared(), FusePrepare())[0], FusePrepare())
