"""Captures compute what the model computes, in pieces or whole, and agree on every weight's name and shape."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from passes.base import run
from passes.graph import attributes, calls, site_of
from passes.invariants import check_lowered, check_quantized
from passes.lowering import LOWERING
from passes.methods import METHODS
from passes.quant_spec import QuantPlan, QuantSpec
from pipeline.capture import (
    ENDS,
    INPUT_NAMES,
    OUTPUT_NAMES,
    Recorded,
    capture_piece,
    capture_whole,
    constants,
    materialise,
    pieces,
    untied,
)
from pipeline.models.transformer import Transformer, rotary_angles
from tests.passes.sketch import copy_of
from tests.pipeline.random_models import V, tiny

TOP_K = 4
Captures = tuple[Transformer, GraphModule, dict[str, GraphModule]]


@pytest.fixture(scope="module", params=["llada", "dream"])
def captures(request: pytest.FixtureRequest) -> Captures:
    """A model, its whole graph on the meta device, and its pieces; Dream's has biases, grouped heads, a tied head."""
    dream = request.param == "dream"
    random = tiny(shifted=dream)
    config = replace(random.config, num_kv_heads=1 if dream else 2, tied_head=dream)
    model = Transformer(config).eval()
    for name, value in model.named_parameters():
        if name.endswith("norm.weight"):
            value.data.uniform_(0.5, 1.5)
    weights = checkpoint_of(model)
    made = {p.name: capture_piece(config, p, {n: weights[n] for n in p.weights}) for p in pieces(config)}
    return model, capture_whole(config, top_k=TOP_K), made


def checkpoint_of(model: Transformer) -> dict[str, Tensor]:
    """What a checkpoint gives for the untied model, by our names."""
    weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
    return weights | {"head.weight": model.head.weight.detach().clone()}


def feeds(batch: int, query: int, rows: int) -> tuple[Tensor, ...]:
    ids = torch.randint(0, V - 4, (batch, query))
    kv_len = torch.randint(1, query + 1, (batch,))
    kv_len[0] = query
    bias = torch.zeros(V)
    bias[-1] = -torch.inf
    chosen = torch.randint(0, query, (batch, rows))
    return ids, torch.arange(query).expand(batch, query), kv_len, chosen, bias, torch.rand(batch) + 0.5


def assert_close(found: Tensor, expected: Tensor) -> None:
    """Sums of at most 48 products in two orders, through two blocks: 48 roundings, ten deep."""
    assert float((found - expected).abs().max()) <= 480 * 2.0**-24 * float(expected.abs().max())


def test_pieces_part_the_weights(captures: Captures) -> None:
    model, _, made = captures
    parts = pieces(model.config)
    assert [part.name for part in parts] == [ENDS, "blocks.0", "blocks.1"] == list(made)
    names = [name for part in parts for name in part.weights]
    assert len(names) == len(set(names))
    assert set(names) == set(checkpoint_of(model))
    assert all(name.startswith(f"{part.name}.") for part in parts[1:] for name in part.weights)


def test_whole_graph_has_shapes_and_no_values(captures: Captures) -> None:
    _, whole, _ = captures
    assert all(weight.is_meta for weight in attributes(whole).values())
    assert [node.name for node in whole.graph.nodes if node.op == "placeholder"] == list(INPUT_NAMES)
    assert len(list(whole.graph.output_node().all_input_nodes)) == len(OUTPUT_NAMES)
    record = next(calls(whole, torch.ops.dllmc.record.default))
    assert record.args[-1] == TOP_K


def test_weights_of_pieces_are_those_of_the_whole(captures: Captures) -> None:
    model, whole, made = captures
    together = [item for graph in (*made.values(),) for item in attributes(graph).items()]
    together += constants(model.config).items()
    assert len(together) == len(dict(together))
    expected = {name: (value.shape, value.dtype) for name, value in attributes(whole).items()}
    assert {name: (value.shape, value.dtype) for name, value in together} == expected


@pytest.mark.parametrize("symmetric", [True, False])
def test_passes_leave_the_same_weights_on_pieces_and_whole(captures: Captures, symmetric: bool) -> None:
    model, whole, made = captures
    linear = QuantSpec(w_bits=4, a_bits=4, w_group=16, symmetric=symmetric)
    plan = QuantPlan(linear=linear, head=QuantSpec(w_bits=8, a_bits=8), embedding_bits=8, skip=("blocks.1.mlp.*",))

    def left(graph: GraphModule) -> dict[str, tuple[torch.Size, torch.dtype]]:
        edited = copy_of(graph)
        run(edited, METHODS["rtn"].passes(plan), check_quantized)
        run(edited, LOWERING, check_lowered)
        return {name: (value.shape, value.dtype) for name, value in attributes(edited).items()}

    parts = [left(graph) for graph in made.values()]
    parts.append({name: (value.shape, value.dtype) for name, value in constants(model.config).items()})
    together = {name: kind for part in parts for name, kind in part.items()}
    assert sum(map(len, parts)) == len(together)
    assert together == left(whole)
    assert ("blocks.0.attn.o_proj.w_sum" in together) is not symmetric


def test_linears_are_merged(captures: Captures) -> None:
    _, whole, made = captures
    block = ["attn.q_k_v_proj", "attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"]
    expected = {f"blocks.{i}": [f"blocks.{i}.{site}" for site in block] for i in range(2)} | {ENDS: ["head"]}

    def sites(graph: GraphModule) -> list[str]:
        return [site_of(linear) for linear in calls(graph, torch.ops.aten.linear.default)]

    assert {name: sites(graph) for name, graph in made.items()} == expected
    assert sites(whole) == [*expected["blocks.0"], *expected["blocks.1"], "head"]


@pytest.mark.parametrize(("batch", "query"), [(1, 1), (3, 9), (1, 6), (4, 1)])
@torch.no_grad()
def test_pieces_in_a_row_are_the_model(captures: Captures, batch: int, query: int) -> None:
    model, _, made = captures
    ids, positions, kv_len, *_ = feeds(batch, query, 1)
    cos, sin = rotary_angles(positions, constants(model.config)["rope_frequencies"])
    visible = (torch.arange(query)[None, :] < kv_len[:, None])[:, None, None, :].expand(-1, 1, query, -1)
    x, _ = made[ENDS](ids, torch.zeros(batch, query, model.config.hidden_size))
    for i in range(model.config.num_layers):
        x = made[f"blocks.{i}"](x, cos, sin, visible, (ids == model.config.mask_id).int())
    assert_close(x, model.hidden(ids, positions, kv_len))
    _, logits = made[ENDS](ids, x)
    assert_close(logits, model.logits(ids, positions, kv_len))


@pytest.mark.parametrize(("batch", "query", "rows"), [(1, 1, 1), (3, 9, 2), (1, 7, 7), (4, 1, 3), (2, 5, 1)])
@torch.no_grad()
def test_the_whole_graph_runs_once_it_has_weights(captures: Captures, batch: int, query: int, rows: int) -> None:
    model, whole, made = captures
    weights = {name: value for graph in made.values() for name, value in attributes(graph).items()}
    graph = materialise(copy_of(whole), weights | constants(model.config))
    inputs = feeds(batch, query, rows)
    ids, positions, kv_len, chosen, bias, inv_temp = inputs
    logits = model.logits(ids, positions, kv_len)
    picked = logits.gather(1, chosen[:, :, None].expand(-1, -1, V))
    expected = torch.ops.dllmc.record(picked, bias, inv_temp, TOP_K)
    found = graph(*inputs)
    assert len(found) == len(OUTPUT_NAMES)
    assert [one.shape for one in found] == [other.shape for other in expected]
    assert_close(found[1], expected[1])
    assert_close(found[4], expected[4])
    clear = expected[1][..., 0] - expected[1][..., 1] > 1e-3
    assert bool((found[0][..., 0] == expected[0][..., 0])[clear].all())


@torch.no_grad()
def test_what_lies_beyond_a_row_s_length_is_never_seen(captures: Captures) -> None:
    model, whole, made = captures
    weights = {name: value for graph in made.values() for name, value in attributes(graph).items()}
    graph = materialise(copy_of(whole), weights | constants(model.config))
    ids, positions, kv_len, _, bias, inv_temp = feeds(2, 6, 1)
    kv_len, chosen = torch.tensor([4, 2]), torch.tensor([[3, 0], [1, 0]])
    other = ids.clone()
    other[0, 4:], other[1, 2:] = 1, 2
    one, two = (graph(each, positions, kv_len, chosen, bias, inv_temp) for each in (ids, other))
    for found, expected in zip(one, two, strict=True):
        assert torch.equal(found, expected)


def test_a_tied_head_gets_a_name_of_its_own(captures: Captures) -> None:
    model, whole, made = captures
    assert untied(model.config) == replace(model.config, tied_head=False)
    assert {"embed.weight", "head.weight"} <= set(attributes(whole))
    ends = attributes(made[ENDS])
    assert torch.equal(ends["head.weight"], model.head.weight)
    assert torch.equal(ends["embed.weight"], model.embed.weight)
    assert ends["head.weight"] is not ends["embed.weight"]
    assert Recorded(model.config, top_k=1).head.weight is not Recorded(model.config, top_k=1).embed.weight


def test_debug_logits_are_a_sixth_output() -> None:
    config = replace(tiny(shifted=False).config, num_layers=1)
    graph = capture_whole(config, top_k=TOP_K, debug_logits=True)
    materialise(graph, {name: torch.rand(weight.shape) for name, weight in attributes(graph).items()})
    inputs = feeds(2, 5, 3)
    *record, logits = graph(*inputs)
    assert logits.shape == (2, 3, V)
    for found, expected in zip(record, torch.ops.dllmc.record(logits, *inputs[-2:], TOP_K), strict=True):
        assert torch.equal(found, expected)


def test_weights_of_another_shape_or_name_are_refused(captures: Captures) -> None:
    model, _, _ = captures
    block = pieces(model.config)[1]
    weights = {name: checkpoint_of(model)[name] for name in block.weights}
    with pytest.raises(ValueError, match=r"missing: .*o_proj"):
        capture_piece(model.config, block, {n: w for n, w in weights.items() if "o_proj" not in n})
    with pytest.raises(ValueError, match=r"o_proj.weight has shape \(3, 3\)"):
        capture_piece(model.config, block, weights | {"blocks.0.attn.o_proj.weight": torch.zeros(3, 3)})


def test_a_piece_captured_twice_is_the_same_graph(captures: Captures) -> None:
    model, _, made = captures
    block = pieces(model.config)[2]
    again = capture_piece(model.config, block, {name: checkpoint_of(model)[name] for name in block.weights})
    assert str(again.graph) == str(made[block.name].graph)


def test_editing_a_capture_leaves_the_next_one_alone(captures: Captures) -> None:
    model, whole, made = captures
    text = str(whole.graph)
    spoilt = capture_whole(model.config, top_k=TOP_K)
    run(spoilt, METHODS["rtn"].passes(QuantPlan(linear=QuantSpec(w_bits=4, a_bits=4), head=None)), check_quantized)
    materialise(spoilt, {name: torch.zeros(value.shape) for name, value in attributes(spoilt).items()})
    again = capture_whole(model.config, top_k=TOP_K)
    assert str(again.graph) == str(whole.graph) == text
    assert all(weight.is_meta for weight in attributes(again).values())
    first, second = (attributes(made[name]) for name in ("blocks.0", "blocks.1"))
    assert not {id(value) for value in first.values()} & {id(value) for value in second.values()}
