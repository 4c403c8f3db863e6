"""Scale the input channels of linears, for nothing at run time: `W diag(s)`, and what makes the channels divided by s.

SmoothQuant (arXiv 2211.10438), equation 3; which weights make a channel is in `producers.py`.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from passes.graph import attribute, attribute_name, calls, is_attribute, node_of, site_of, update_attributes
from passes.producers import Producer, scalable

# site -> scale float32 [K] of its input channels, None to leave it alone
ScaleSolver = Callable[[str], Tensor | None]


class FoldScale:
    """Channels made by one row of v (GQA) get one scale, the geometric mean of theirs. On shapes alone nothing changes.

    Raises ValueError for a scale that is not positive, and for a site whose input no weight makes linearly.
    """

    def __init__(self, solve: ScaleSolver) -> None:
        self.solve = solve

    def __call__(self, graph: GraphModule) -> int:
        count = 0
        for linear in calls(graph, torch.ops.aten.linear.default):
            if not is_attribute(linear.args[1]) or attribute(graph, node_of(linear.args[1])).is_meta:
                continue
            scale = self.solve(site_of(linear))
            if scale is not None:
                self._fold(graph, linear, scale)
                count += 1
        return count

    @staticmethod
    def _fold(graph: GraphModule, linear: Node, scale: Tensor) -> None:
        weight, producer = node_of(linear.args[1]), scalable(graph, linear)
        if scale.shape != producer.rows.shape or not bool(((scale > 0) & scale.isfinite()).all()):
            raise ValueError(f"scales of {site_of(linear)} are not {len(producer.rows)} positive numbers")
        tied = producer.tie(scale.double().log(), "mean").exp().float()
        scaled = {attribute_name(weight): attribute(graph, weight) * tied}
        update_attributes(graph, scaled | _divided(graph, producer, tied))


def _divided(graph: GraphModule, producer: Producer, scale: Tensor) -> dict[str, Tensor]:
    divided = {}
    for node in (producer.weight, producer.bias):
        if node is not None:
            value = attribute(graph, node)
            divisor = torch.ones(len(value))
            divisor[producer.rows] = scale
            divided[attribute_name(node)] = value / divisor.reshape(-1, *[1] * (value.dim() - 1))
    return divided
