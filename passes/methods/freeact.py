"""FreeAct (arXiv 2603.01776): FlatQuant whose transforms keep some coordinates for each mask state alone."""

from passes.base import Pass
from passes.fit import Fit
from passes.gate_transforms import GateTransforms
from passes.methods import flatquant
from passes.methods.method import INTEGER, Method
from passes.quant_spec import QuantPlan


def _rewrite(plan: QuantPlan, fit: Fit) -> list[Pass]:
    return flatquant.learned_transforms(plan, fit, share=plan.options.freeact.share)


def _solve(plan: QuantPlan, fit: Fit) -> list[Pass]:
    return [GateTransforms(plan.options.freeact.share, plan.mask_id), *flatquant.clipped_weights(plan, fit)]


METHOD = Method(
    name="freeact",
    summary="flatquant with coordinates of their own for masked and for unmasked tokens",
    needs_calibration=True,
    formats=INTEGER,
    rewrite=_rewrite,
    solve=_solve,
)
