"""Move the gain of a norm into the linears that read it: `linear(norm(x, w), W)` -> `linear(norm(x, 1), W diag(w))`.

Exact in real numbers, and what a rotation of the residual stream needs, since a gain does not commute with it (QuaRot,
arXiv 2404.00456, section 4.1).
"""

import torch
from torch.fx import GraphModule, Node

from passes.graph import attribute, attribute_name, calls, is_attribute, is_call, node_of, update_attributes

aten = torch.ops.aten


class FoldNorm:
    """Only norms that nothing but float linears read, with weights of their own; the gain becomes ones."""

    def __call__(self, graph: GraphModule) -> int:
        count = 0
        for norm in calls(graph, aten.rms_norm.default):
            gain = norm.args[2] if len(norm.args) > 2 else None
            weights = [reader.args[1] for reader in norm.users if is_call(reader, aten.linear.default)]
            if not weights or len(weights) != len(norm.users) or not all(map(is_attribute, [gain, *weights])):
                continue
            nodes = [node_of(value) for value in (gain, *weights)]
            if any(num_readers(graph, node) != 1 for node in nodes):
                continue
            value = attribute(graph, nodes[0])
            for node in nodes[1:]:  # one by one, so that one weight at a time is there twice
                update_attributes(graph, {attribute_name(node): attribute(graph, node) * value})
            update_attributes(graph, {attribute_name(nodes[0]): torch.ones_like(value)})
            count += 1
        return count


def num_readers(graph: GraphModule, weight: Node) -> int:
    """How many nodes read the weight or buffer that `weight` reads."""
    return sum(len(node.users) for node in graph.graph.find_nodes(op="get_attr") if node.target == weight.target)
