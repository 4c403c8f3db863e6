"""Put the weights of linears on their grids: `linear(x, W)` -> `linear(x, dequantize(codes, scale))`."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx import GraphModule

from passes.graph import add_attribute, attribute, calls, is_attribute, node_of, site_of
from passes.quant_spec import QuantPlan, QuantSpec
from passes.solvers.nearest import round_to_nearest

# (site, weight [N, K], spec) -> codes int8 [N, K], scales float32 [N, G]
WeightSolver = Callable[[str, Tensor, QuantSpec], tuple[Tensor, Tensor]]


def nearest(site: str, weight: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """The solver that needs no calibration."""
    return round_to_nearest(weight, bits=spec.w_bits, group=spec.w_group)


class QuantizeWeights:
    """Every linear that the plan names, by the method's solver."""

    def __init__(self, plan: QuantPlan, solve: WeightSolver) -> None:
        self.plan, self.solve = plan, solve

    def __call__(self, graph: GraphModule) -> int:
        count = 0
        for linear in calls(graph, torch.ops.aten.linear.default):
            site = site_of(linear)
            spec = self.plan.spec(site)
            if spec is None or spec.w_bits >= 16 or not is_attribute(linear.args[1]):
                continue
            codes, scale = self.solve(site, attribute(graph, node_of(linear.args[1])), spec)
            with graph.graph.inserting_before(linear):
                stored = (
                    add_attribute(graph, f"{site}.codes", codes),
                    add_attribute(graph, f"{site}.w_scale", scale),
                )
                weight = graph.graph.call_function(
                    torch.ops.dllmc.dequantize.default, (*stored, spec.w_bits, spec.w_group)
                )
            linear.update_arg(1, weight)
            count += 1
        return count
