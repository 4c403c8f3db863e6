"""Simulated linears become integer ones: exact where sums of whole numbers are, else within the sums' rounding."""

from typing import Any

import pytest
import torch
from torch.fx import GraphModule

from passes.graph import attributes
from passes.lower_linears import LowerLinears
from tests.passes.lockstep import assert_lowered_equals_simulated
from tests.passes.sketch import Sketch, assert_untouched, aten, count, edited, only, ops

K, N = 32, 12
OPS = {4: ops.int4_linear.default, 8: ops.int8_linear.default}


def simulated(
    *, a_bits: int, w_bits: int, symmetric: bool, a_group: int, w_group: int, bias: bool, linears: int = 1
) -> GraphModule:
    sketch = Sketch()
    x = sketch(ops.fake_quant.default, sketch.input("x"), a_bits, symmetric, a_group, 1.0, 1.0)
    limit = 2 ** (w_bits - 1) - 1
    results = []
    for i in range(linears):
        codes = sketch.weight(f"mlp.{i}.codes", torch.randint(-limit, limit + 1, (N, K), dtype=torch.int8))
        scale = sketch.weight(f"mlp.{i}.w_scale", torch.rand(N, K // (w_group or K)) + 0.01)
        weight = sketch(ops.dequantize.default, codes, scale, w_bits, w_group)
        rest = [sketch.weight(f"mlp.{i}.bias", torch.randn(N))] if bias else []
        results.append(sketch(aten.linear.default, x, weight, *rest))
    return sketch.output(*results)


def rows() -> torch.Tensor:
    """Ordinary, skewed, negative and zero rows."""
    x = torch.randn(2, 4, K)
    x[0, 1] += 3
    x[0, 2] = -x[0, 2].abs()
    x[1, 3] = 0
    return x


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("groups", [(0, 0), (8, 0), (0, 8), (8, 8)])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("a_bits", "w_bits"), [(4, 4), (8, 4), (8, 8), (4, 8)])
def test_equals_the_simulation(a_bits: int, w_bits: int, symmetric: bool, groups: tuple[int, int], bias: bool) -> None:
    form: dict[str, Any] = {"a_bits": a_bits, "w_bits": w_bits, "symmetric": symmetric}
    graph = simulated(**form, a_group=groups[0], w_group=groups[1], bias=bias)
    lowered, counts = edited(graph, LowerLinears())
    assert counts == [1]
    kinds = (aten.linear.default, ops.fake_quant.default, ops.dequantize.default)
    assert [count(lowered, kind) for kind in kinds] == [0, 0, 0]
    call = only(lowered, OPS[w_bits])
    assert call.args[7:] == (None, a_bits, w_bits, *groups, False, 0)
    assert only(lowered, ops.quantize.default).args[1:] == (
        *[None] * 7,
        *(a_bits, symmetric, groups[0], 1.0, 1.0, 0.0, 0, 0),
    )
    assert assert_lowered_equals_simulated(graph, lowered, (rows(),)) == 1


def test_whole_numbers_agree_to_the_bit() -> None:
    graph = simulated(a_bits=8, w_bits=4, symmetric=True, a_group=0, w_group=0, bias=False)
    attributes(graph)["mlp.0.w_scale"].fill_(0.5)
    lowered, _ = edited(graph, LowerLinears())
    x = torch.randint(-127, 128, (5, K)).float()
    x[:, 0] = 127  # the scale of every row is 1
    assert torch.equal(lowered(x), graph(x))


@pytest.mark.parametrize("groups", [(0, 0), (0, 8), (8, 0), (8, 8)])
def test_sums_of_codes_are_stored_for_skewed_activations(groups: tuple[int, int]) -> None:
    """One sum for each group that has its own zero point or its own weight scale."""
    graph = simulated(a_bits=4, w_bits=4, symmetric=False, a_group=groups[0], w_group=groups[1], bias=False)
    lowered, _ = edited(graph, LowerLinears())
    weights = attributes(lowered)
    w_sum = weights["mlp.0.w_sum"]
    assert w_sum.dtype == torch.int32
    assert torch.equal(w_sum, weights["mlp.0.codes"].int().reshape(N, -1, max(groups) or K).sum(-1).int())


def test_symmetric_activations_store_no_sums() -> None:
    lowered, _ = edited(simulated(a_bits=4, w_bits=4, symmetric=True, a_group=0, w_group=0, bias=False), LowerLinears())
    assert set(attributes(lowered)) == {"mlp.0.codes", "mlp.0.w_scale"}


@pytest.mark.parametrize("symmetric", [True, False])
def test_one_quantiser_serves_all_linears_of_one_input(symmetric: bool) -> None:
    graph = simulated(a_bits=8, w_bits=8, symmetric=symmetric, a_group=0, w_group=0, bias=True, linears=3)
    lowered, counts = edited(graph, LowerLinears())
    assert counts == [3]
    assert count(lowered, ops.quantize.default) == 1
    assert count(lowered, ops.int8_linear.default) == 3
    assert assert_lowered_equals_simulated(graph, lowered, (rows(),)) == 3


def test_float_activations_keep_dequantize_and_linear() -> None:
    sketch = Sketch()
    codes = sketch.weight("head.codes", torch.ones(N, K, dtype=torch.int8))
    scale = sketch.weight("head.w_scale", torch.ones(N, 4))
    weight = sketch(ops.dequantize.default, codes, scale, 4, 8)
    assert_untouched(sketch.output(sketch(aten.linear.default, sketch.input("x"), weight)), LowerLinears())
