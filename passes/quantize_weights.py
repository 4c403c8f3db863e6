"""Put the weights of linears on their grids: `linear(x, W)` -> `linear(x, dequantize(codes, scale, zero))`."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from passes.graph import add_attribute, attribute, calls, is_attribute, is_call, node_of, site_of
from passes.quant_spec import QuantPlan, QuantSpec
from passes.solvers.grid import Grid
from passes.solvers.nearest import round_to_nearest

# (site, weight [N, K], spec) -> the weight on its grid
WeightSolver = Callable[[str, Tensor, QuantSpec], Grid]

ops = torch.ops.dllmc


def nearest(site: str, weight: Tensor, spec: QuantSpec, clip: Tensor | None = None) -> Grid:
    """The solver that needs no calibration; `clip` [N, G] are ratios of the range where a method found some."""
    return round_to_nearest(weight, bits=spec.w_bits, group=spec.w_group, symmetric=spec.w_symmetric, clip=clip)


class QuantizeWeights:
    """Every linear that the plan names, by the method's solver."""

    def __init__(self, plan: QuantPlan, solve: WeightSolver) -> None:
        self.plan, self.solve = plan, solve

    def __call__(self, graph: GraphModule) -> int:
        count = 0
        for linear, site, spec in planned(graph, self.plan):
            store_grid(graph, linear, self.solve(site, float_weight(graph, linear), spec), spec)
            count += 1
        return count


def planned(graph: GraphModule, plan: QuantPlan) -> Iterator[tuple[Node, str, QuantSpec]]:
    """Linears, in order of execution, whose weight the plan quantises and no pass has yet, with site and spec.

    Raises ValueError for one whose weight is neither a stored float nor on a grid: none is left out in silence.
    """
    for linear in calls(graph, torch.ops.aten.linear.default):
        site = site_of(linear)
        spec = plan.spec(site)
        if spec is None or spec.w_bits >= 16 or is_call(linear.args[1], ops.dequantize.default):
            continue
        if not is_attribute(linear.args[1]):
            raise ValueError(f"{site} does not read a stored weight")
        yield linear, site, spec


def float_weight(graph: GraphModule, linear: Node) -> Tensor:
    """Weight [N, K] of a linear that no pass has quantised."""
    return attribute(graph, node_of(linear.args[1]))


def store_grid(graph: GraphModule, linear: Node, grid: Grid, spec: QuantSpec) -> None:
    """The linear computes with the dequantised codes; these, the scales and the zeros are stored under its site.

    Raises ValueError for shapes that are not those of the linear and its spec.
    """
    site, shape = site_of(linear), float_weight(graph, linear).shape
    scales = (shape[0], shape[1] // (spec.w_group or shape[1]))
    zero = grid.zero
    fits = (grid.codes.shape, grid.scale.shape) == (shape, scales) and (zero is None) == spec.w_symmetric
    if not fits or (zero is not None and zero.shape != scales):
        raise ValueError(f"the grid of {site} has codes {tuple(grid.codes.shape)} and scales {tuple(grid.scale.shape)}")
    with graph.graph.inserting_before(linear):
        stored = [
            add_attribute(graph, f"{site}.codes", grid.codes),
            add_attribute(graph, f"{site}.w_scale", grid.scale),
        ]
        offsets = () if zero is None else (add_attribute(graph, f"{site}.w_zero", zero),)
        arguments = (*stored, spec.w_bits, spec.w_group, *offsets)
        linear.update_arg(1, graph.graph.call_function(ops.dequantize.default, arguments))
