"""Put weights on their grids one after another, each by what reaches it through those already on theirs."""

from collections.abc import Callable

from torch import Tensor
from torch.fx import GraphModule

from passes.fit import CalibrationError, Samples
from passes.graph import drop_unused
from passes.hessians import Weigh, hessian
from passes.quant_spec import QuantPlan, QuantSpec
from passes.quantize_weights import float_weight, nearest, planned, store_grid
from passes.solvers.gptq import SingularHessianError
from passes.solvers.grid import Grid

# (weight [N, K], hessian [K, K], spec) -> the weight on its grid
HessianSolver = Callable[[Tensor, Tensor, QuantSpec], Grid]


class QuantizeInSequence:
    """Every linear that the plan names, in order of execution; on shapes alone grids have the right shapes.

    Raises CalibrationError, with the site's name, for inputs from which no Hessian comes that can be inverted.
    """

    def __init__(
        self, plan: QuantPlan, samples: Samples | None, solve: HessianSolver, weigh: Weigh | None = None
    ) -> None:
        self.plan, self.samples, self.solve, self.weigh = plan, samples, solve, weigh

    def __call__(self, graph: GraphModule) -> int:
        count = 0
        for linear, site, spec in planned(graph, self.plan):
            weight = float_weight(graph, linear)
            if weight.is_meta:
                grid = nearest(site, weight, spec)
            elif self.samples is None:
                raise ValueError(f"{site} cannot be solved without samples")
            else:
                try:
                    grid = self.solve(weight, hessian(graph, linear, self.samples, self.weigh), spec)
                except SingularHessianError as error:
                    raise CalibrationError(f"inputs of {site} leave nothing to solve by: {error}") from error
            store_grid(graph, linear, grid, spec)
            drop_unused(graph)  # the float weight goes before the next one is copied
            count += 1
        return count
