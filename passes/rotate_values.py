"""Rotate the values of attention head by head, for nothing at run time.

    rows of v:  head h's W_v -> R^T W_v, b_v -> R^T b_v          columns of o:  each head's W_o -> W_o R

Exact in real numbers: attention mixes tokens, the rotation mixes channels. One R [C, C] serves all heads of a layer, so
grouped heads stay grouped (QuaRot, arXiv 2404.00456, stage 1c).
Shape letters: N outputs, K inner, C channels a head.
"""

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from passes.graph import attribute, attribute_name, calls, node_of, site_of, update_attributes
from passes.producers import Producer, attention_before, head_size, producer_of
from passes.solvers.draws import generator
from passes.solvers.hadamard import rotation

aten = torch.ops.aten


class RotateValues:
    """Every attention. Raises ValueError for one whose values no linear makes, or that no linear reads."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __call__(self, graph: GraphModule) -> int:
        count = 0
        for linear in calls(graph, aten.linear.default):
            producer = producer_of(graph, linear)
            if producer is None or producer.through != "attention":
                continue
            if not attribute(graph, producer.weight).is_meta:
                self._rotate(graph, linear, producer)
            count += 1
        if count != len(list(calls(graph, aten.scaled_dot_product_attention.default))):
            raise ValueError("an attention does not stand between two float linears")
        return count

    def _rotate(self, graph: GraphModule, linear: Node, producer: Producer) -> None:
        turn = rotation(head_size(attention_before(linear)), generator(self.seed, site_of(linear), "values"))
        rows = torch.unique(producer.rows)
        source = node_of(linear.args[1])
        changed = {attribute_name(source): _by_head(attribute(graph, source), turn)}
        for node in (producer.weight, producer.bias):
            if node is not None:
                made = attribute(graph, node).clone()
                made[rows] = _by_head(made[rows].movedim(0, -1), turn).movedim(-1, 0)
                changed[attribute_name(node)] = made
        update_attributes(graph, changed)


def _by_head(rows: Tensor, turn: Tensor) -> Tensor:
    """Rows [..., K] with each head's C channels turned."""
    return (torch.unflatten(rows.double(), -1, (-1, len(turn))) @ turn).flatten(-2).to(rows.dtype)
