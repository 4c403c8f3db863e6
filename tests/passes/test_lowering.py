"""Whole graphs: what lowering makes computes what was simulated, and every place where it can fuse is fused."""

import pytest
import torch
from torch import Tensor

from passes.base import run
from passes.graph import attributes
from passes.invariants import check_lowered, check_quantized
from passes.lowering import LOWERING
from passes.methods import METHODS
from passes.quant_spec import QuantPlan, QuantSpec
from tests.passes.conftest import Whole
from tests.passes.lockstep import assert_lowered_equals_simulated
from tests.passes.sketch import aten, copy_of, count, ops

W8A8 = QuantSpec(w_bits=8, a_bits=8)
W4A4 = QuantSpec(w_bits=4, a_bits=4)
# Name -> plan, and places changed by LowerLinears, FuseNorm, FuseSwiglu, FuseResidual in two blocks and a head.
PLANS: dict[str, tuple[QuantPlan, list[int]]] = {
    "w4a4": (QuantPlan(linear=W4A4, head=W8A8), [9, 5, 2, 4]),
    "w4a4 skewed": (QuantPlan(linear=QuantSpec(w_bits=4, a_bits=4, symmetric=False), head=W8A8), [9, 5, 2, 4]),
    "w4a4 in groups": (
        QuantPlan(linear=QuantSpec(w_bits=4, a_bits=4, w_group=16, a_group=16), head=W8A8),
        [9, 5, 2, 4],
    ),
    "w4a4 skewed in token groups": (
        QuantPlan(linear=QuantSpec(w_bits=4, a_bits=4, a_group=16, symmetric=False), head=W8A8),
        [9, 5, 2, 4],
    ),
    "w8a8": (QuantPlan(linear=W8A8, head=W8A8), [9, 5, 2, 4]),
    "w8a8 skewed": (QuantPlan(linear=QuantSpec(w_bits=8, a_bits=8, symmetric=False), head=W8A8), [9, 5, 2, 4]),
    "w4a8 in channel groups": (QuantPlan(linear=QuantSpec(w_bits=4, a_bits=8, w_group=16), head=W8A8), [9, 5, 2, 4]),
    "w4a16": (QuantPlan(linear=QuantSpec(w_bits=4, w_group=16), head=W8A8), [1, 1, 0, 0]),
    "w3a16, float head": (QuantPlan(linear=QuantSpec(w_bits=3, w_group=16), head=None), [0, 0, 0, 0]),
    "some skipped": (QuantPlan(linear=W4A4, head=W8A8, skip=("*.down_proj", "blocks.1.*")), [4, 3, 1, 1]),
    "float head": (QuantPlan(linear=W4A4, head=None), [8, 4, 2, 4]),
    "int8 embedding": (QuantPlan(linear=W8A8, head=W8A8, embedding_bits=8), [9, 5, 2, 4]),
    "nothing": (QuantPlan(linear=None, head=None), [0, 0, 0, 0]),
}


@pytest.mark.parametrize("family", ["llada", "dream"])
@pytest.mark.parametrize("name", PLANS)
def test_lowered_equals_simulated(whole: Whole, feeds: tuple[Tensor, ...], family: str, name: str) -> None:
    plan, expected = PLANS[name]
    simulated = whole(family)
    run(simulated, METHODS["rtn"].passes(plan), check_quantized)
    lowered = copy_of(simulated)
    changed = run(lowered, LOWERING, check_lowered)
    assert changed.pop("FusePrepare") == 0  # nothing is transformed
    # Dream's logits are an output here, so its head keeps them.
    fused_head = int(family == "llada" and plan.spec("head") is not None)
    assert list(changed.values()) == [*expected, fused_head]
    quantised = plan.linear is not None and plan.linear.a_bits < 16
    assert count(lowered, aten.add.Tensor) == count(simulated, aten.add.Tensor) - expected[3]
    assert count(lowered, aten.rms_norm.default) == 5 - expected[1]
    assert count(lowered, aten.silu.default) == 2 - expected[2]
    assert count(lowered, ops.quantize.default) == count(simulated, ops.fake_quant.default)
    integers = [ops.int4_linear.default, ops.int8_linear.default, ops.head.default]
    assert sum(count(lowered, op) for op in integers) == expected[0]
    assert (count(lowered, ops.dequantize.default) == 0) or not quantised
    assert assert_lowered_equals_simulated(simulated, lowered, feeds) == expected[0]


def test_weights_are_the_simulated_ones_and_sums_of_codes(whole: Whole) -> None:
    plan, _ = PLANS["w4a4 skewed"]
    graph = whole("dream")
    run(graph, METHODS["rtn"].passes(plan), check_quantized)
    before = attributes(graph)
    run(graph, LOWERING, check_lowered)
    after = attributes(graph)
    assert {name for name in after if name not in before} == {
        f"blocks.{i}.{site}.w_sum"
        for i in range(2)
        for site in ("attn.q_k_v_proj", "attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    }
    assert set(before) <= set(after)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_lowering_twice_changes_nothing(whole: Whole) -> None:
    graph = whole("llada")
    run(graph, METHODS["rtn"].passes(PLANS["w4a4"][0]), check_quantized)
    run(graph, LOWERING, check_lowered)
    text = str(graph.graph)
    assert sum(run(graph, LOWERING, check_lowered).values()) == 0
    assert str(graph.graph) == text
