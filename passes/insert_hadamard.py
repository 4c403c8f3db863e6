"""Hadamard transforms at run time, before linears whose input no weight can turn alone; inverses in their weights.

    linear(flatten(transpose(attention)), W)      across heads only: Hadamard [H, H] kron identity [C, C]
    linear(silu(gate) * up, W)                    over all channels: Hadamard [a, a] kron Hadamard [b, b]

Within a head the values are turned by their weights (`rotate_values`), so that both together turn all channels (QuaRot,
arXiv 2404.00456, stages 1b and 1c). Shape letters: H heads, C channels a head, a x b the Kronecker factors.
"""

import torch
from torch.fx import GraphModule, Node

from passes.graph import attribute, calls, node_of, site_of
from passes.insert_transform import InsertTransform, Transform
from passes.producers import attention_before, head_size, producer_of
from passes.quant_spec import QuantPlan
from passes.solvers.draws import generator
from passes.solvers.hadamard import rotation
from passes.solvers.kronecker import factors


class InsertHadamard:
    """Such linears where the plan quantises their activations."""

    def __init__(self, plan: QuantPlan, seed: int) -> None:
        self.plan, self.seed = plan, seed

    def __call__(self, graph: GraphModule) -> int:
        made: dict[str, Transform] = {}
        for linear in calls(graph, torch.ops.aten.linear.default):
            spec, producer = self.plan.spec(site_of(linear)), producer_of(graph, linear)
            if spec is not None and spec.a_bits < 16 and producer is not None and producer.through != "norm":
                made[site_of(linear)] = self._transform(graph, linear, across_heads=producer.through == "attention")
        return InsertTransform(made.get)(graph)

    def _transform(self, graph: GraphModule, linear: Node, *, across_heads: bool) -> Transform:
        width = attribute(graph, node_of(linear.args[1])).shape[1]
        draw = generator(self.seed, site_of(linear), "hadamard")
        if across_heads:
            size = head_size(attention_before(linear))
            return Transform(left=rotation(width // size, draw), right=torch.eye(size))
        left, right = (rotation(factor, draw) for factor in factors(width))
        return Transform(left=left, right=right)
