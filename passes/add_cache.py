"""Let a lowered whole graph keep keys and values: a pass then computes a window of the canvas, not all of it.

attention(q, k, v, visible) -> attend(q, cache_update(past_k, k), cache_update(past_v, v), kv_len)

The inputs write_start, past_k_0, past_v_0, past_k_1, .. are added, and an output for each cache: all its slots
(`in_place`: a runtime may give it the memory of the input), or the window alone (`window`: whoever runs the graph
places it).
Shape letters: B batch, Q query rows, S slots, J key/value heads, C channels a head.
"""

from typing import Literal

import torch
from torch.fx import GraphModule, Node
from torch.fx.graph import CodeGen

from passes.graph import calls, node_of

CacheProfile = Literal["in_place", "window"]
WRITE_START = "write_start"
KINDS = ("k", "v")

aten, ops = torch.ops.aten, torch.ops.dllmc


def past_names(layers: int) -> tuple[str, ...]:
    """Inputs that hold the caches, in order."""
    return tuple(f"past_{kind}_{layer}" for layer in range(layers) for kind in KINDS)


def present_names(layers: int, profile: CacheProfile) -> tuple[str, ...]:
    """Outputs that hold what the caches become, or the part of it that is new."""
    stem = {"in_place": "present", "window": "present_window"}[profile]
    return tuple(f"{stem}_{kind}_{layer}" for layer in range(layers) for kind in KINDS)


class AddCache:
    """Every attention of the graph, in order."""

    def __init__(self, profile: CacheProfile) -> None:
        self.profile = profile

    def __call__(self, graph: GraphModule) -> int:
        inputs = {node.name: node for node in graph.graph.find_nodes(op="placeholder")}
        attentions = list(calls(graph, aten.scaled_dot_product_attention.default))
        with graph.graph.inserting_after(inputs["position_ids"]):
            inputs[WRITE_START] = graph.graph.placeholder(WRITE_START)
        last = inputs["inv_temp"]
        for name in past_names(len(attentions)):
            with graph.graph.inserting_after(last):
                inputs[name] = last = graph.graph.placeholder(name)
        kept = [self._replace(graph, node, layer, inputs) for layer, node in enumerate(attentions)]
        (output,) = graph.graph.find_nodes(op="output")
        outputs = output.args[0]
        assert isinstance(outputs, tuple)
        output.args = ((*outputs, *(value for pair in kept for value in pair)),)
        graph.graph.set_codegen(CodeGen())  # the capture's own still counts what it was made with
        return len(attentions)

    def _replace(self, graph: GraphModule, node: Node, layer: int, inputs: dict[str, Node]) -> tuple[Node, Node]:
        if len(node.args) > 4 or set(node.kwargs) - {"enable_gqa"}:
            raise ValueError(f"{node.name} has dropout, a causal mask or a scale of its own")
        q, *new = (node_of(arg) for arg in node.args[:3])
        in_place = self.profile == "in_place"
        with graph.graph.inserting_before(node):
            present = [
                graph.graph.call_function(
                    ops.cache_update.default, (inputs[f"past_{kind}_{layer}"], value, inputs[WRITE_START], in_place)
                )
                for kind, value in zip(KINDS, new, strict=True)
            ]
            attended = graph.graph.call_function(ops.attend.default, (q, *present, inputs["kv_len"], not in_place))
        node.replace_all_uses_with(attended)
        graph.graph.erase_node(node)
        k, v = present if in_place else new
        return k, v
