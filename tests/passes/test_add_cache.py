"""The cached graph computes what the graph did, on the whole canvas and on a window of it."""

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from passes.add_cache import AddCache, CacheProfile, kept_arrays, past_names, present_names
from passes.base import PassError, run
from passes.graph import calls
from passes.invariants import check_lowered
from passes.quant_spec import AttentionSpec, QuantPlan, QuantSpec
from passes.quantize_attention import QuantizeAttention
from pipeline.capture import INPUT_NAMES, capture_whole, materialise
from tests.passes.sketch import Sketch, aten, copy_of, count, ops
from tests.pipeline.random_models import V, tiny

QUERY, SLOTS = 12, 20


@pytest.fixture(scope="module")
def plain() -> GraphModule:
    """Two layers of float attention with grouped heads."""
    graph = capture_whole(tiny(shifted=False).config, top_k=4, debug_logits=True)
    draw = torch.Generator().manual_seed(1)
    weights = {name: torch.randn(value.shape, generator=draw) / 4 for name, value in graph.named_buffers()}
    return materialise(graph, weights)


def cached(plain: GraphModule, profile: CacheProfile) -> GraphModule:
    graph = copy_of(plain)
    assert run(graph, [AddCache(profile)], check_lowered) == {"AddCache": 2}
    return graph


def inputs(kv_len: list[int]) -> list[Tensor]:
    """Of a full pass that asks for the logits of every row."""
    draw = torch.Generator().manual_seed(2)
    ids = torch.randint(V, (len(kv_len), QUERY), generator=draw)
    positions = torch.arange(QUERY).expand_as(ids).contiguous()
    return [ids, positions, torch.tensor(kv_len), positions.clone(), torch.zeros(V), torch.ones(len(kv_len))]


def empty(batch: int) -> list[Tensor]:
    return [torch.zeros(batch, 1, SLOTS, 16) for _ in past_names(2)]


@pytest.mark.parametrize("profile", ["in_place", "window"])
def test_a_full_pass_is_what_it_was(plain: GraphModule, profile: CacheProfile) -> None:
    six = inputs([12, 5])
    graph = cached(plain, profile)
    expected = plain(*six)
    found = graph(*six[:2], torch.zeros(2, dtype=torch.long), *six[2:], *empty(2))
    for ours, theirs in zip(found[:6], expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert len(found) == 6 + 4
    assert {tuple(kept.shape) for kept in found[6:]} == {(2, 1, SLOTS if profile == "in_place" else QUERY, 16)}


@pytest.mark.parametrize("profile", ["in_place", "window"])
def test_a_window_finds_the_rest_in_the_cache(plain: GraphModule, profile: CacheProfile) -> None:
    ids, positions, kv_len, rows, bias, inv_temp = inputs([12, 5])
    graph, start = cached(plain, profile), torch.tensor([4, 1])
    *_, logits = plain(ids, positions, kv_len, rows, bias, inv_temp)
    whole = graph(ids, positions, torch.zeros_like(start), kv_len, rows, bias, inv_temp, *empty(2))
    past = list(whole[6:])
    if profile == "window":
        past = [torch.cat((new, torch.zeros(2, 1, SLOTS - QUERY, 16)), dim=2) for new in past]
    window = start[:, None] + torch.arange(3)
    taken = [ids.gather(1, window), window, start, kv_len, torch.arange(3).expand(2, -1), bias, inv_temp]
    found = graph(*taken, *past)
    torch.testing.assert_close(found[5], torch.take_along_dim(logits, window[..., None], dim=1))
    for ours, kept in zip(found[6:], past, strict=True):
        new = torch.take_along_dim(kept, window[:, None, :, None], dim=2)
        torch.testing.assert_close(ours, kept if profile == "in_place" else new)


@pytest.mark.parametrize("profile", ["in_place", "window"])
def test_of_quantised_operands_codes_and_scales_are_kept(plain: GraphModule, profile: CacheProfile) -> None:
    """Eight bits of keys, four of values; the record is that of the graph without a cache, on windows, too."""
    spec = AttentionSpec(k_bits=8, v_bits=4)
    plan = QuantPlan(linear=QuantSpec(w_bits=4, a_bits=4, symmetric=False), head=None, attention=spec)
    simulated = copy_of(plain)
    run(simulated, [QuantizeAttention(plan)], check_lowered)
    graph, arrays = cached(simulated, profile), kept_arrays(plan, 16)
    assert arrays == {
        "k": (torch.int8, 16),
        "k_scale": (torch.float32, 1),
        "k_zero": (torch.int32, 1),
        "v": (torch.int8, 8),
        "v_scale": (torch.float32, 1),
        "v_zero": (torch.int32, 1),
    }
    names = [str(node.target) for node in graph.graph.find_nodes(op="placeholder")]
    assert names[7:] == list(past_names(2, arrays))
    ids, positions, kv_len, rows, bias, inv_temp = inputs([12, 5])
    none = [torch.zeros(2, 1, SLOTS, width, dtype=dtype) for dtype, width in (*arrays.values(), *arrays.values())]
    start = torch.tensor([4, 1])
    *_, logits = simulated(ids, positions, kv_len, rows, bias, inv_temp)
    whole = graph(ids, positions, torch.zeros_like(start), kv_len, rows, bias, inv_temp, *none)
    torch.testing.assert_close(whole[5], logits)
    assert [value.dtype for value in whole[6:]] == [value.dtype for value in none]
    past = list(whole[6:])
    if profile == "window":
        past = [torch.cat((new, old[:, :, QUERY:]), dim=2) for new, old in zip(past, none, strict=True)]
    window = start[:, None] + torch.arange(3)
    taken = [ids.gather(1, window), window, start, kv_len, torch.arange(3).expand(2, -1), bias, inv_temp]
    found = graph(*taken, *past)
    torch.testing.assert_close(found[5], torch.take_along_dim(logits, window[..., None], dim=1))


def test_sixteen_bits_keep_floats_alone() -> None:
    assert kept_arrays(QuantPlan(linear=None, head=None), 12) == {
        "k": (torch.float32, 12),
        "v": (torch.float32, 12),
    }


def test_inputs_stand_in_the_order_of_the_signature(plain: GraphModule) -> None:
    graph = cached(plain, "in_place")
    names = [str(node.target) for node in graph.graph.find_nodes(op="placeholder")]
    assert names == [*INPUT_NAMES[:2], "write_start", *INPUT_NAMES[2:], *past_names(2)]
    assert past_names(2) == ("past_k_0", "past_v_0", "past_k_1", "past_v_1")
    assert present_names(1, "in_place") == ("present_k_0", "present_v_0")
    assert present_names(1, "window") == ("present_window_k_0", "present_window_v_0")
    assert count(graph, ops.attend.default) == 2
    assert not count(graph, aten.scaled_dot_product_attention.default)
    assert count(graph, aten.expand.default) == count(plain, aten.expand.default) - 1  # the mask went with it


@pytest.mark.parametrize("profile", ["in_place", "window"])
def test_a_runtime_that_places_windows_itself_is_told_by_a_mask(plain: GraphModule, profile: CacheProfile) -> None:
    graph = cached(plain, profile)
    assert {node.args[4] for node in calls(graph, ops.attend.default)} == {profile == "window"}
    assert {node.args[3] for node in calls(graph, ops.cache_update.default)} == {profile == "in_place"}


def test_a_causal_attention_is_refused() -> None:
    sketch = Sketch()
    given = [sketch.input(name) for name in ("position_ids", "kv_len", "inv_temp", "q", "k", "v")]
    attended = sketch(aten.scaled_dot_product_attention.default, *given[3:], None, 0.0, True)
    with pytest.raises(PassError, match="causal"):
        run(sketch.output(attended), [AddCache("in_place")], check_lowered)
