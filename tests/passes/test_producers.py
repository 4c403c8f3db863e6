"""Every channel's producer is found by the graph's structure, or none is."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx import GraphModule, Node

from passes.graph import attribute_name, attributes, calls, node_of, site_of
from passes.producers import END, Producer, attention_before, head_size, producer_of, query_key_rows
from tests.passes.lockstep import Values
from tests.passes.sketch import Sketch, aten, only


def attention(groups: int, repeats: int, size: int, *, bias: bool = False, read_twice: bool = False) -> GraphModule:
    """q, k, v of one linear through attention into `attn.o_proj`; `read_twice` shows the values, too."""
    inner, values = groups * repeats * size, groups * size
    sketch = Sketch()
    x = sketch.input("x")
    total = inner + 2 * values
    merged = sketch.linear(x, "attn.q_k_v_proj", torch.randn(total, 6), torch.randn(total) if bias else None)
    heads = []
    for first, end in ((0, inner), (inner, inner + values), (inner + values, total)):
        part = sketch(aten.slice.Tensor, merged, -1, first, end)
        heads.append(sketch(aten.transpose.int, sketch(aten.unflatten.int, part, -1, [-1, size]), 1, 2))
    mixed = sketch(aten.scaled_dot_product_attention.default, *heads, enable_gqa=repeats > 1)
    rows = sketch(aten.flatten.using_ints, sketch(aten.transpose.int, mixed, 1, 2), -2)
    out = sketch.linear(rows, "attn.o_proj", torch.randn(4, inner))
    return sketch.output(out, *([heads[2]] if read_twice else []))


def mlp(*, bias: bool = False, first: int = 1, swapped: bool = False, scaled: bool = False) -> GraphModule:
    """SwiGLU of a merged linear into `mlp.down_proj`."""
    sketch = Sketch()
    x = sketch.input("x")
    merged = sketch.linear(x, "mlp.gate_up_proj", torch.randn(10, 6), torch.randn(10) if bias else None)
    gate, up = (sketch(aten.slice.Tensor, merged, -1, i, END, 2) for i in (1 - first, first))
    active = sketch(aten.silu.default, gate)
    product = sketch(aten.mul.Tensor, *((up, active) if swapped else (active, 3.0 if scaled else up)))
    return sketch.output(sketch.linear(product, "mlp.down_proj", torch.randn(4, 5)))


def normed(*, shared: bool = False, gain: bool = True) -> GraphModule:
    sketch = Sketch()
    x = sketch.input("x")
    weight = sketch.weight("norm.weight", torch.rand(6)) if gain else None
    norm = sketch(aten.rms_norm.default, x, [6], weight, 1e-5)
    out = [sketch.linear(norm, f"{name}_proj", torch.randn(4, 6)) for name in ("a", *(["b"] if shared else []))]
    return sketch.output(*out)


def named(graph: GraphModule, site: str) -> Node:
    (found,) = (node for node in calls(graph, aten.linear.default) if site_of(node) == site)
    return found


def found_in(graph: GraphModule, site: str) -> Producer:
    producer = producer_of(graph, named(graph, site))
    assert producer is not None
    return producer


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5))
def test_heads_of_a_group_share_the_rows_of_v(groups: int, repeats: int, size: int) -> None:
    producer = found_in(attention(groups, repeats, size), "attn.o_proj")
    # What attention does with grouped values: each head's block, as often as query heads read it.
    values = torch.arange(groups * size).reshape(groups, size).repeat_interleave(repeats, dim=0).flatten()
    assert torch.equal(producer.rows, groups * repeats * size + groups * size + values)
    assert producer.through == "attention"
    assert attribute_name(producer.weight) == "attn.q_k_v_proj.weight"
    assert producer.bias is None


def test_attention_and_its_head_size() -> None:
    graph = attention(2, 3, 4)
    found = attention_before(named(graph, "attn.o_proj"))
    assert found is only(graph, aten.scaled_dot_product_attention.default)
    assert head_size(found) == 4
    found.update_arg(2, found.args[2].args[0])  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="does not read values split into heads"):
        head_size(found)


def test_a_row_of_v_makes_what_its_channels_show() -> None:
    """By experiment: with one row of v left, the channels that name it are not zero, and no other is."""
    graph = attention(2, 3, 4)
    rows = found_in(graph, "attn.o_proj").rows
    weight = attributes(graph)["attn.q_k_v_proj.weight"]
    kept = weight.clone()
    for row in rows.unique().tolist():
        weight[32:] = 0
        weight[row] = kept[row]
        values = Values(graph)
        values.run(torch.randn(2, 5, 6))
        shown = values.values[node_of(named(graph, "attn.o_proj").args[0])]
        assert torch.equal((shown != 0).flatten(0, 1).any(0), rows == row)


def test_up_rows_are_the_odd_ones() -> None:
    producer = found_in(mlp(bias=True), "mlp.down_proj")
    assert producer.rows.tolist() == [1, 3, 5, 7, 9]
    assert producer.through == "swiglu"
    assert [attribute_name(node) for node in (producer.weight, producer.bias) if node] == [
        "mlp.gate_up_proj.weight",
        "mlp.gate_up_proj.bias",
    ]


def test_a_gain_makes_its_own_channel() -> None:
    producer = found_in(normed(), "a_proj")
    assert producer.rows.tolist() == list(range(6))
    assert attribute_name(producer.weight) == "norm.weight"


@pytest.mark.parametrize(
    ("graph", "site"),
    [
        (normed(shared=True), "a_proj"),
        (normed(gain=False), "a_proj"),
        (attention(2, 1, 4, read_twice=True), "attn.o_proj"),
        (attention(2, 1, 4), "attn.q_k_v_proj"),
        (mlp(first=0), "mlp.down_proj"),
        (mlp(swapped=True), "mlp.down_proj"),
        (mlp(scaled=True), "mlp.down_proj"),
    ],
    ids=["shared norm", "no gain", "values read twice", "an input", "gate is odd", "gate is second", "a constant"],
)
def test_no_producer_where_a_division_would_be_seen(graph: GraphModule, site: str) -> None:
    assert producer_of(graph, named(graph, site)) is None


def test_query_and_key_rows_are_those_that_are_no_values() -> None:
    graph = attention(2, 3, 4)
    rows = query_key_rows(graph, named(graph, "attn.q_k_v_proj"))
    assert rows.tolist() == [True] * 32 + [False] * 8
    assert not query_key_rows(graph, named(graph, "attn.o_proj")).any()
    graph = mlp()
    assert not query_key_rows(graph, named(graph, "mlp.gate_up_proj")).any()


def test_channels_of_one_row_are_joined() -> None:
    graph = attention(1, 2, 2)
    producer = found_in(graph, "attn.o_proj")
    values = torch.tensor([1.0, 5.0, 3.0, -7.0])
    assert producer.tie(values, "amax").tolist() == [3.0, 5.0, 3.0, 5.0]
    assert producer.tie(values, "mean").tolist() == [2.0, -1.0, 2.0, -1.0]
    graph = normed()
    assert torch.equal(found_in(graph, "a_proj").tie(torch.arange(6.0), "amax"), torch.arange(6.0))


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_every_linear_of_a_whole_model_has_a_producer(family: str, whole) -> None:  # type: ignore[no-untyped-def]
    graph = whole(family)
    through = [producer.through for node in calls(graph, aten.linear.default) if (producer := producer_of(graph, node))]
    assert through == ["norm", "attention", "norm", "swiglu"] * 2 + ["norm"]
