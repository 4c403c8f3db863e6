"""SwiGLU and the residual add move into the linear in front of them, and only where nothing else reads between."""

import pytest
import torch
from torch.fx import GraphModule, Node

from passes.fuse_epilogue import FuseResidual, FuseSwiglu
from passes.graph import calls
from tests.passes.sketch import HALVES, Sketch, assert_untouched, aten, count, edited, only, ops

K, N = 8, 6
LINEARS = {4: ops.int4_linear.default, 8: ops.int8_linear.default}
RESIDUAL, SWIGLU = 7, 12
CODES = torch.randint(-7, 8, (3, K), dtype=torch.int8, generator=torch.Generator().manual_seed(1))
SCALE = torch.tensor([[0.25], [1.0], [0.125]])
R = torch.randn(3, N, generator=torch.Generator().manual_seed(2))


def integer_linear(sketch: Sketch, codes: Node, scale: Node, name: str = "down", bits: int = 4) -> Node:
    weight = sketch.weight(f"{name}.codes", torch.randint(-7, 8, (N, K), dtype=torch.int8))
    w_scale = sketch.weight(f"{name}.w_scale", torch.rand(N, 1) + 0.1)
    arguments = (codes, scale, None, weight, w_scale, None, None, None, 4, bits, 0, 0, False, 0)
    return sketch(LINEARS[bits], *arguments)


def start() -> tuple[Sketch, Node, Node]:
    sketch = Sketch()
    return sketch, sketch.input("codes"), sketch.input("scale")


def swiglu(*, first: int = 0, second: int = 1, extra: str = "", bits: int = 4) -> GraphModule:
    sketch, codes, scale = start()
    linear = integer_linear(sketch, codes, scale, "gate_up", bits)
    gate, up = (sketch(aten.slice.Tensor, linear, *HALVES[half]) for half in (first, second))
    active = sketch(aten.silu.default, gate)
    product = sketch(aten.mul.Tensor, active, up)
    nodes = {"linear": linear, "gate": gate, "up": up, "active": active}
    return sketch.output(product, *([nodes[extra]] if extra else []))


@pytest.mark.parametrize("bits", [4, 8])
def test_swiglu_moves_into_the_linear(bits: int) -> None:
    graph = swiglu(bits=bits)
    fused, counts = edited(graph, FuseSwiglu())
    assert counts == [1]
    assert [count(fused, op) for op in (aten.slice.Tensor, aten.silu.default, aten.mul.Tensor)] == [0, 0, 0]
    assert only(fused, LINEARS[bits]).args[SWIGLU] is True
    found, expected = fused(CODES, SCALE), graph(CODES, SCALE)
    assert found.shape == (3, N // 2)
    # silu in float64 and in float32: exp, sum and quotient, each good to an ulp or two, then the product
    assert bool(((found - expected).abs() <= 8 * 2**-24 * expected.abs()).all())


@pytest.mark.parametrize("extra", ["linear", "gate", "up", "active"])
def test_swiglu_read_in_between_stays(extra: str) -> None:
    assert_untouched(swiglu(extra=extra), FuseSwiglu())


@pytest.mark.parametrize(("first", "second"), [(1, 0), (0, 0), (1, 1)])
def test_swiglu_of_other_halves_stays(first: int, second: int) -> None:
    assert_untouched(swiglu(first=first, second=second), FuseSwiglu())


def test_swiglu_of_two_linears_stays() -> None:
    sketch, codes, scale = start()
    first, second = (integer_linear(sketch, codes, scale, name) for name in ("a", "b"))
    gate, _, _, up = (sketch(aten.slice.Tensor, linear, *half) for linear in (first, second) for half in HALVES)
    assert_untouched(sketch.output(sketch(aten.mul.Tensor, sketch(aten.silu.default, gate), up)), FuseSwiglu())


def test_swiglu_of_a_float_linear_stays() -> None:
    sketch = Sketch()
    linear = sketch.linear(sketch.input("x"), "mlp.gate_up_proj", torch.ones(N, K))
    gate, up = (sketch(aten.slice.Tensor, linear, *half) for half in HALVES)
    assert_untouched(sketch.output(sketch(aten.mul.Tensor, sketch(aten.silu.default, gate), up)), FuseSwiglu())


def residual(*, reverse: bool = False, late: bool = False, bits: int = 4) -> GraphModule:
    """r + linear; `late` computes r behind the linear."""
    sketch, codes, scale = start()
    r = sketch.input("r")
    early = sketch(aten.neg.default, r)
    linear = integer_linear(sketch, codes, scale, bits=bits)
    other = sketch(aten.neg.default, early) if late else early
    return sketch.output(sketch(aten.add.Tensor, *((linear, other) if reverse else (other, linear))))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_residual_moves_into_the_linear(reverse: bool, late: bool, bits: int) -> None:
    graph = residual(reverse=reverse, late=late, bits=bits)
    fused, counts = edited(graph, FuseResidual())
    assert counts == [1]
    assert (count(graph, aten.add.Tensor), count(fused, aten.add.Tensor)) == (1, 0)
    assert only(fused, LINEARS[bits]).args[RESIDUAL] is list(calls(fused, aten.neg.default))[-1]
    assert torch.equal(fused(CODES, SCALE, R), graph(CODES, SCALE, R))
    assert_untouched(fused, FuseResidual())


def test_two_linears_added_up_keep_one_add() -> None:
    sketch, codes, scale = start()
    left, right = (integer_linear(sketch, codes, scale, name) for name in ("a", "b"))
    graph = sketch.output(sketch(aten.add.Tensor, left, right))
    fused, counts = edited(graph, FuseResidual())
    assert counts == [1]
    assert count(fused, LINEARS[4]) == 2
    assert torch.equal(fused(CODES, SCALE), graph(CODES, SCALE))


def test_a_linear_takes_one_residual() -> None:
    sketch, codes, scale = start()
    r = sketch.input("r")
    inner = sketch(aten.add.Tensor, r, integer_linear(sketch, codes, scale))
    graph = sketch.output(sketch(aten.add.Tensor, r, inner))
    fused, counts = edited(graph, FuseResidual())
    assert counts == [1]
    assert count(fused, aten.add.Tensor) == 1
    assert torch.equal(fused(CODES, SCALE, R), graph(CODES, SCALE, R))


def test_a_chain_of_blocks_is_fused_throughout() -> None:
    sketch, codes, scale = start()
    x = sketch.input("r")
    for name in ("a", "b", "c"):
        x = sketch(aten.add.Tensor, x, integer_linear(sketch, codes, scale, name))
    graph = sketch.output(x)
    fused, counts = edited(graph, FuseResidual())
    assert counts == [3]
    assert torch.equal(fused(CODES, SCALE, R), graph(CODES, SCALE, R))


def test_residual_of_a_linear_read_elsewhere_stays() -> None:
    sketch, codes, scale = start()
    linear = integer_linear(sketch, codes, scale)
    total = sketch(aten.add.Tensor, sketch.input("r"), linear)
    assert_untouched(sketch.output(total, sketch(aten.neg.default, linear)), FuseResidual())


def test_adds_of_other_things_stay() -> None:
    sketch, codes, scale = start()
    r = sketch.input("r")
    doubled = integer_linear(sketch, codes, scale, "doubled")
    scaled, shifted = (integer_linear(sketch, codes, scale, name) for name in ("scaled", "shifted"))
    floating = sketch.linear(r, "plain", torch.ones(N, N))
    graph = sketch.output(
        sketch(aten.add.Tensor, doubled, doubled),
        sketch(aten.add.Tensor, r, scaled, alpha=2),
        sketch(aten.add.Tensor, shifted, 1.0),
        sketch(aten.add.Tensor, r, floating),
    )
    assert_untouched(graph, FuseResidual())


def test_swiglu_takes_no_residual() -> None:
    sketch, codes, scale = start()
    linear = integer_linear(sketch, codes, scale)
    linear.update_arg(SWIGLU, True)
    assert_untouched(sketch.output(sketch(aten.add.Tensor, sketch.input("r"), linear)), FuseResidual())
