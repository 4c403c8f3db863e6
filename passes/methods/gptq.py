"""GPTQ (arXiv 2210.17323): rounding in sequence, the error of each column made up for by those after it."""

from torch import Tensor

from passes.base import Pass
from passes.fit import Fit
from passes.hessians import Weigh
from passes.methods.method import INTEGER, WEIGHT_ONLY, Method
from passes.quant_spec import QuantPlan, QuantSpec
from passes.quantize_in_sequence import HessianSolver, QuantizeInSequence
from passes.solvers.gptq import gptq
from passes.solvers.grid import Grid


def gptq_solver(plan: QuantPlan, *, clip: bool = False) -> HessianSolver:
    """GPTQ with the plan's options; `clip` searches the clip ratio of each scale."""
    options = plan.options.gptq

    def solve(weight: Tensor, hessian: Tensor, spec: QuantSpec) -> Grid:
        return gptq(
            weight,
            hessian,
            bits=spec.w_bits,
            group=spec.w_group,
            symmetric=spec.w_symmetric,
            damping=options.damping,
            block=options.block,
            act_order=options.act_order,
            clip=clip,
        )

    return solve


def solve_by_gptq(plan: QuantPlan, fit: Fit, *, clip: bool = False, weigh: Weigh | None = None) -> list[Pass]:
    """Every linear of the plan by `gptq_solver`."""
    return [QuantizeInSequence(plan, fit.samples, gptq_solver(plan, clip=clip), weigh)]


METHOD = Method(
    name="gptq",
    summary="weights rounded so that later columns make up for the error of earlier ones",
    needs_calibration=True,
    formats=WEIGHT_ONLY | INTEGER,
    solve=solve_by_gptq,
    inputs="quantized",
)
