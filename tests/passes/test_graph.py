"""Questions asked of a graph, and the few edits: attributes come and go by dotted name."""

import operator

import pytest
import torch
from torch import nn

from passes.graph import (
    add_attribute,
    attribute,
    attribute_name,
    attributes,
    calls,
    drop_unused,
    int_of,
    is_attribute,
    is_call,
    node_of,
    outputs,
    set_attributes,
    site_of,
    twin_of,
    update_attributes,
)
from tests.passes.sketch import Sketch, aten, count, ops


def two_linears() -> tuple[Sketch, torch.fx.GraphModule]:
    sketch = Sketch()
    x = sketch.input("x")
    y = sketch.linear(x, "blocks.0.attn.o_proj", torch.ones(3, 4))
    z = sketch.linear(y, "head", torch.ones(2, 3))
    return sketch, sketch.output(z)


def test_calls_in_order_and_safe_against_edits() -> None:
    _, graph = two_linears()
    seen = []
    for node, _ in zip(calls(graph, aten.linear.default), range(5), strict=False):
        seen.append(site_of(node))
        with graph.graph.inserting_after(node):  # a call of the same op, not to be met again
            graph.graph.call_function(aten.linear.default, node.args)
    assert seen == ["blocks.0.attn.o_proj", "head"]
    assert count(graph, aten.linear.default) == 4
    assert count(graph, aten.linear) == 0  # the packet is not the overload


def test_questions() -> None:
    _, graph = two_linears()
    first, _ = calls(graph, aten.linear.default)
    assert is_call(first, aten.linear.default)
    assert not is_call(first, aten.silu.default)
    assert not is_call(3, aten.linear.default)
    assert is_attribute(first.args[1])
    assert not is_attribute(first)
    assert not is_attribute(None)
    assert node_of(first) is first
    with pytest.raises(TypeError, match=r"expected a node, found 2\.5"):
        node_of(2.5)


def test_int_of() -> None:
    assert int_of(4) == 4
    with pytest.raises(TypeError):
        int_of("4")


def test_attributes_by_dotted_name() -> None:
    _, graph = two_linears()
    first, second = calls(graph, aten.linear.default)
    assert attribute_name(node_of(first.args[1])) == "blocks.0.attn.o_proj.weight"
    assert attribute(graph, node_of(second.args[1])).shape == (2, 3)
    assert {name: tuple(value.shape) for name, value in attributes(graph).items()} == {
        "blocks.0.attn.o_proj.weight": (3, 4),
        "head.weight": (2, 3),
    }


def test_add_attribute_beside_and_below() -> None:
    _, graph = two_linears()
    value = nn.Parameter(torch.ones(3))
    node = next(calls(graph, aten.linear.default))
    with graph.graph.inserting_before(node):
        made = add_attribute(graph, "blocks.0.attn.o_proj.bias", value)
        below = add_attribute(graph, "quite.new.scale", torch.zeros(1))
    assert made.next is below
    assert below.next is node
    assert torch.equal(attribute(graph, made), value)
    assert not attribute(graph, made).requires_grad
    assert attribute(graph, below).shape == (1,)
    with pytest.raises(ValueError, match=r"already has a weight 'quite\.new\.scale'"):
        add_attribute(graph, "quite.new.scale", torch.zeros(1))


def test_set_attributes_checks_shapes() -> None:
    _, graph = two_linears()
    new = {"blocks.0.attn.o_proj.weight": torch.full((3, 4), 2.0), "head.weight": torch.full((2, 3), 3.0)}
    set_attributes(graph, new)
    assert torch.equal(graph(torch.ones(1, 4)), torch.full((1, 2), 72.0))
    with pytest.raises(ValueError, match=r"weight head\.weight has shape \(3, 2\), the graph expects \(2, 3\)"):
        set_attributes(graph, {**new, "head.weight": torch.zeros(3, 2)})
    with pytest.raises(ValueError, match=r"missing: .*head\.weight"):
        set_attributes(graph, {"blocks.0.attn.o_proj.weight": torch.zeros(3, 4)})


def test_update_attributes_leaves_the_others() -> None:
    _, graph = two_linears()
    other = attributes(graph)["blocks.0.attn.o_proj.weight"]
    update_attributes(graph, {"head.weight": nn.Parameter(torch.full((2, 3), 3.0))})
    assert torch.equal(graph(torch.ones(1, 4)), torch.full((1, 2), 36.0))
    assert attributes(graph)["blocks.0.attn.o_proj.weight"] is other
    assert not attributes(graph)["head.weight"].requires_grad
    graph.register_buffer("never_read", torch.ones(1))
    with pytest.raises(ValueError, match=r"reads no weights never_read, tail\.weight"):
        update_attributes(graph, {"tail.weight": torch.zeros(2, 3), "never_read": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"weight head\.weight has shape \(3, 2\), the graph expects \(2, 3\)"):
        update_attributes(graph, {"head.weight": torch.zeros(3, 2)})


def test_twin_shares_weights_until_they_are_replaced() -> None:
    _, graph = two_linears()
    twin = twin_of(graph)
    for name, value in attributes(graph).items():
        assert attributes(twin)[name] is value
    update_attributes(graph, {"head.weight": torch.full((2, 3), 3.0)})
    graph.graph.erase_node(next(node for node in reversed(graph.graph.nodes) if node.op == "output"))
    assert torch.equal(twin(torch.ones(1, 4)), torch.full((1, 2), 12.0))


def test_drop_unused_removes_dead_nodes_and_their_weights_only() -> None:
    sketch = Sketch()
    x = sketch.input("x")
    sketch.linear(x, "dead.q_proj", torch.ones(2, 4))
    shared = sketch.weight("shared.weight", torch.ones(4, 4))
    sketch(aten.linear.default, x, shared)
    graph = sketch.output(sketch(aten.linear.default, x, shared))
    graph.register_buffer("never_read", torch.ones(1))
    drop_unused(graph)
    assert count(graph, aten.linear.default) == 1
    assert set(graph.state_dict()) == {"shared.weight"}


def test_outputs_are_getitems() -> None:
    sketch = Sketch()
    call = sketch(aten.split_with_sizes.default, sketch.input("x"), [1, 2], -1)
    graph = sketch.output(call)
    with graph.graph.inserting_after(call):
        first, second = outputs(graph, call, 2)
    assert [node.args for node in (first, second)] == [(call, 0), (call, 1)]
    assert first.target is operator.getitem


def test_site_of_whatever_stands_for_the_weight() -> None:
    sketch = Sketch()
    x = sketch.input("x")
    codes = sketch.weight("blocks.1.mlp.down_proj.codes", torch.ones(2, 4, dtype=torch.int8))
    scale = sketch.weight("blocks.1.mlp.down_proj.w_scale", torch.ones(2, 1))
    quantised = sketch(aten.linear.default, x, sketch(ops.dequantize.default, codes, scale, 4, 0))
    half = sketch.weight("head.weight_half", torch.ones(2, 4).half())
    stored = sketch(aten.linear.default, x, sketch(aten.to.dtype, half, torch.float32))
    plain = sketch.linear(x, "blocks.0.attn.o_proj", torch.ones(2, 4))
    assert site_of(quantised) == "blocks.1.mlp.down_proj"
    assert site_of(stored) == "head"
    assert site_of(plain) == "blocks.0.attn.o_proj"
