"""The LM head joins its record: the same five outputs to the bit, and only where nothing else reads logits."""

import operator
from typing import Any

import pytest
import torch
from torch.fx import GraphModule

from passes.fuse_head import FuseHead
from tests.passes.sketch import Sketch, assert_untouched, count, edited, only, ops

B, R, K, V = 2, 3, 16, 20


def head_graph(*, logits_out: bool = False, op: Any = None, bias: bool = False, **changed: Any) -> GraphModule:
    """record(int8_linear(codes)); `changed` overrides arguments of the linear by name."""
    sketch = Sketch()
    codes, scale, logit_bias, inv_temp = (sketch.input(name) for name in ("codes", "scale", "logit_bias", "inv_temp"))
    weight = sketch.weight("head.codes", torch.randint(-127, 128, (V, K), dtype=torch.int8))
    w_scale = sketch.weight("head.w_scale", torch.rand(V, K // changed.get("w_group", K)) + 0.1)
    arguments: dict[str, Any] = {
        "codes": codes,
        "scale": scale,
        "zero": None,
        "weight": weight,
        "w_scale": w_scale,
        "w_sum": None,
        "bias": sketch.weight("head.bias", torch.randn(V)) if bias else None,
        "residual": None,
        "a_bits": 8,
        "w_bits": 8,
        "a_group": 0,
        "w_group": 0,
        "swiglu": False,
        "layout": 0,
    }
    logits = sketch(op or ops.int8_linear.default, *(arguments | changed).values())
    record = sketch(ops.record.default, logits, logit_bias, inv_temp, 4)
    outputs = [sketch(operator.getitem, record, i) for i in range(5)]
    return sketch.output(*outputs, *([logits] if logits_out else []))


def inputs() -> tuple[torch.Tensor, ...]:
    bias = torch.zeros(V)
    bias[7] = -torch.inf
    codes = torch.randint(-127, 128, (B, R, K), dtype=torch.int8)
    return codes, torch.rand(B, R, 1), bias, torch.tensor([1.0, 0.5])


def test_head_and_record_become_one_op() -> None:
    graph = head_graph()
    fused, counts = edited(graph, FuseHead())
    assert counts == [1]
    assert [count(fused, op) for op in (ops.int8_linear.default, ops.record.default)] == [0, 0]
    assert only(fused, ops.head.default).args[-1] == 4
    given = inputs()
    for found, expected in zip(fused(*given), graph(*given), strict=True):
        assert torch.equal(found, expected)
    assert_untouched(fused, FuseHead())


def test_logits_that_are_an_output_keep_the_linear() -> None:
    assert_untouched(head_graph(logits_out=True), FuseHead())


@pytest.mark.parametrize("changed", [{"bias": True}, {"w_group": 8}, {"a_group": 8}, {"a_bits": 4}])
def test_a_head_that_the_op_cannot_compute_stays(changed: dict[str, Any]) -> None:
    assert_untouched(head_graph(**changed), FuseHead())


def test_a_skewed_head_stays() -> None:
    graph = head_graph()
    linear = only(graph, ops.int8_linear.default)
    linear.update_arg(2, linear.args[1])
    linear.update_arg(5, linear.args[4])
    assert_untouched(graph, FuseHead())


def test_heads_in_other_formats_stay() -> None:
    assert_untouched(head_graph(op=ops.int4_linear.default), FuseHead())
    sketch = Sketch()
    logits = sketch.linear(sketch.input("x"), "head", torch.ones(V, K))
    record = sketch(ops.record.default, logits, sketch.input("logit_bias"), sketch.input("inv_temp"), 4)
    assert_untouched(sketch.output(record), FuseHead())
