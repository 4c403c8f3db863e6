"""Rotate queries and keys after their rotary embedding, so that keys have no outliers when they are quantised.

    attention(q, k, v)  ->  attention(rotate(q, R), rotate(k, R), v)

Exact in real numbers, since q R (k R)^T = q k^T. R cannot move before the embedding, which does not commute with it, so
both nodes stay (QuaRot, arXiv 2404.00456, stage 2b). Shape letter: C channels a head.
"""

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from passes.graph import add_attribute, attributes, calls, is_call, node_of, site_of
from passes.producers import head_size
from passes.solvers.draws import generator
from passes.solvers.hadamard import rotation

aten, ops = torch.ops.aten, torch.ops.dllmc


class RotateKeys:
    """Every attention; one rotation serves all heads of a layer."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __call__(self, graph: GraphModule) -> int:
        count = 0
        for attention in calls(graph, aten.scaled_dot_product_attention.default):
            layer, size = _layer(attention), head_size(attention)
            with graph.graph.inserting_before(attention):
                stored = self._stored(graph, layer, size)
                for place, x in enumerate(attention.args[:2]):
                    attention.update_arg(place, graph.graph.call_function(ops.rotate.default, (x, *stored)))
            count += 1
        return count

    def _stored(self, graph: GraphModule, layer: str, size: int) -> list[Node]:
        """One block of C channels in their own order."""
        on_shapes = any(value.is_meta for value in attributes(graph).values())
        turn: Tensor = rotation(size, generator(self.seed, layer, "keys")).float()[None]
        parts = {"key_rotation": turn, "key_order": torch.arange(size)}
        return [
            add_attribute(graph, f"{layer}.{leaf}", value.to("meta") if on_shapes else value)
            for leaf, value in parts.items()
        ]


def _layer(attention: Node) -> str:
    """Dotted name of the attention layer, by the linear that makes its values."""
    node = node_of(attention.args[2])
    while not is_call(node, aten.linear.default):
        if not node.args:
            raise ValueError(f"no linear makes the values of {attention.name}")
        node = node_of(node.args[0])
    return site_of(node).rpartition(".")[0]
