"""SmoothQuant (arXiv 2211.10438): outliers of activations smoothed into the weights, then both rounded to nearest."""

from passes.base import Pass
from passes.fit import Fit
from passes.methods.method import INTEGER, Method
from passes.quant_spec import QuantPlan
from passes.quantize_weights import QuantizeWeights, nearest
from passes.smooth_scales import SmoothScales


def _rewrite(plan: QuantPlan, fit: Fit) -> list[Pass]:
    return [SmoothScales(plan, fit, alpha=plan.options.smoothquant.alpha)]


def _solve(plan: QuantPlan, fit: Fit) -> list[Pass]:
    return [QuantizeWeights(plan, nearest)]


METHOD = Method(
    name="smoothquant",
    summary="outliers of activations smoothed into the weights by a formula",
    needs_calibration=True,
    formats=INTEGER,
    rewrite=_rewrite,
    solve=_solve,
)
