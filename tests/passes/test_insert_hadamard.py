"""Hadamard transforms at run time stand where weights cannot turn the input, and leave the logits where they were."""

import pytest
import torch
from torch import Tensor

from passes.graph import attributes, calls, is_call, node_of, site_of
from passes.insert_hadamard import InsertHadamard
from passes.quant_spec import QuantPlan, QuantSpec
from tests.passes.conftest import Whole
from tests.passes.rewrites import assert_same_logits, on_shapes
from tests.passes.sketch import assert_untouched, aten, count, edited, ops

PLAN = QuantPlan(linear=QuantSpec(w_bits=4, a_bits=4), head=QuantSpec(w_bits=8, a_bits=8))


@pytest.mark.parametrize(
    ("family", "across", "over"),
    [("llada", (2, 16), (4, 12)), ("dream", (2, 16), (4, 12)), ("odd", (9, 6), (5, 9))],
)
def test_logits_stay(
    whole: Whole, feeds: tuple[Tensor, ...], family: str, across: tuple[int, int], over: tuple[int, int]
) -> None:
    graph = whole(family)
    made, counts = edited(graph, InsertHadamard(PLAN, 0))
    assert counts == [4]
    assert_same_logits(graph, made, feeds)
    weights = attributes(made)
    for layer in range(2):
        for site, sizes in (("attn.o_proj", across), ("mlp.down_proj", over)):
            left, right = (weights[f"blocks.{layer}.{site}.{side}"] for side in ("left", "right"))
            assert (len(left), len(right)) == sizes
        assert torch.equal(weights[f"blocks.{layer}.attn.o_proj.right"], torch.eye(across[1]))
    readers = {site_of(node) for node in calls(made, aten.linear.default) if is_call(node.args[0], ops.prepare.default)}
    assert readers == {f"blocks.{layer}.{site}" for layer in range(2) for site in ("attn.o_proj", "mlp.down_proj")}
    shapes, _ = edited(on_shapes(graph), InsertHadamard(PLAN, 0))
    assert str(shapes.graph) == str(made.graph)


def test_only_where_activations_are_quantised(whole: Whole) -> None:
    floats = QuantPlan(linear=QuantSpec(w_bits=4), head=None)
    assert_untouched(whole("llada"), InsertHadamard(floats, 0))
    skipping = QuantPlan(linear=PLAN.linear, head=None, skip=("blocks.0.*", "*.o_proj"))
    made, counts = edited(whole("llada"), InsertHadamard(skipping, 0))
    assert counts == [1]
    assert count(made, ops.prepare.default) == 1
    (prepare,) = calls(made, ops.prepare.default)
    assert node_of(prepare.args[5]).target == "blocks.1.mlp.down_proj.left"
