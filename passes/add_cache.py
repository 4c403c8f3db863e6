"""Let a lowered whole graph keep keys and values: a pass then computes a window of the canvas, not all of it.

    attention(q, k, v, visible) -> attend(q, cache_update(past_k, k), cache_update(past_v, v), kv_len)

Of an operand that was quantised, what it is dequantised from is kept:

    dequantize_rows(codes, scale) -> dequantize_rows(cache_update(past_k, codes), cache_update(past_k_scale, scale))

The inputs write_start, past_k_0, past_v_0, past_k_1, .. are added, and an output for each cache: all its slots
(`in_place`: a runtime may give it the memory of the input), or the window alone (`window`: whoever runs the graph
places it).
Shape letters: B batch, Q query rows, S slots, J key/value heads, C channels a head.
"""

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch.fx import GraphModule, Node
from torch.fx.graph import CodeGen

from passes.graph import calls, is_call, node_of
from passes.quant_spec import QuantPlan
from plugins.int4 import codes_per_byte

CacheProfile = Literal["in_place", "window"]
WRITE_START = "write_start"
KINDS = ("k", "v")
STORED = ("", "_scale", "_zero")  # the first arguments of `dequantize_rows`, by what they add to a kind's name

aten, ops = torch.ops.aten, torch.ops.dllmc


def kept_arrays(plan: QuantPlan, channels: int) -> dict[str, tuple[torch.dtype, int]]:
    """What one layer keeps, in order: k, k_scale, .. -> type and width of the array [B, J, S, width]."""
    arrays: dict[str, tuple[torch.dtype, int]] = {}
    for kind, bits in zip(KINDS, (plan.attention.k_bits, plan.attention.v_bits), strict=True):
        if bits >= 16:
            arrays[kind] = torch.float32, channels
            continue
        stored = [(torch.int8, channels // codes_per_byte(bits)), (torch.float32, 1), (torch.int32, 1)]
        names = STORED[:2] if plan.symmetric_rows else STORED
        arrays |= {f"{kind}{name}": array for name, array in zip(names, stored, strict=False)}
    return arrays


def past_names(layers: int, kinds: Iterable[str] = KINDS) -> tuple[str, ...]:
    """Inputs that hold the caches, in order."""
    kinds = tuple(kinds)
    return tuple(f"past_{kind}_{layer}" for layer in range(layers) for kind in kinds)


def present_names(layers: int, profile: CacheProfile, kinds: Iterable[str] = KINDS) -> tuple[str, ...]:
    """Outputs that hold what the caches become, or the part of it that is new."""
    stem = {"in_place": "present", "window": "present_window"}[profile]
    return tuple(name.replace("past", stem, 1) for name in past_names(layers, kinds))


class AddCache:
    """Every attention of the graph, in order."""

    def __init__(self, profile: CacheProfile) -> None:
        self.profile = profile

    def __call__(self, graph: GraphModule) -> int:
        inputs = {node.name: node for node in graph.graph.find_nodes(op="placeholder")}
        attentions = list(calls(graph, aten.scaled_dot_product_attention.default))
        new = [_kept(node, layer) for layer, node in enumerate(attentions)]
        with graph.graph.inserting_after(inputs["position_ids"]):
            inputs[WRITE_START] = graph.graph.placeholder(WRITE_START)
        last = inputs["inv_temp"]
        for name in (name for layer in new for name in layer):
            with graph.graph.inserting_after(last):
                inputs[name] = last = graph.graph.placeholder(name)
        kept = [
            value
            for node, layer in zip(attentions, new, strict=True)
            for value in self._replace(graph, node, layer, inputs)
        ]
        (output,) = graph.graph.find_nodes(op="output")
        outputs = output.args[0]
        assert isinstance(outputs, tuple)
        output.args = ((*outputs, *kept),)
        graph.graph.set_codegen(CodeGen())  # the capture's own still counts what it was made with
        return len(attentions)

    def _replace(
        self, graph: GraphModule, node: Node, new: Mapping[str, Node], inputs: Mapping[str, Node]
    ) -> list[Node]:
        """What comes out of the graph for this attention."""
        if len(node.args) > 4 or set(node.kwargs) - {"enable_gqa"}:
            raise ValueError(f"{node.name} has dropout, a causal mask or a scale of its own")
        in_place = self.profile == "in_place"
        with graph.graph.inserting_before(node):
            present = {
                value: graph.graph.call_function(
                    ops.cache_update.default, (inputs[name], value, inputs[WRITE_START], in_place)
                )
                for name, value in new.items()
            }
            q, *operands = (node_of(argument) for argument in node.args[:3])
            read = [present.get(each) or graph.graph.node_copy(each, present.__getitem__) for each in operands]
            attended = graph.graph.call_function(ops.attend.default, (q, *read, inputs["kv_len"], not in_place))
        node.replace_all_uses_with(attended)
        graph.graph.erase_node(node)
        return list(present.values() if in_place else present)


def _kept(attention: Node, layer: int) -> dict[str, Node]:
    """What an attention reads of keys and values, or what that is dequantised from, by the input it will go to."""
    found: dict[str, Node] = {}
    for kind, operand in zip(KINDS, attention.args[1:3], strict=True):
        node = node_of(operand)
        parts = node.all_input_nodes if is_call(node, ops.dequantize_rows.default) else [node]
        found |= {f"past_{kind}{name}_{layer}": part for name, part in zip(STORED, parts, strict=False)}
    return found
