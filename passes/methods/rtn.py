"""Round to nearest: the baseline of every study; scales from the largest magnitude, no calibration."""

from passes.base import Pass
from passes.fit import Fit
from passes.methods.method import INTEGER, WEIGHT_ONLY, Method
from passes.quant_spec import QuantPlan
from passes.quantize_weights import QuantizeWeights, nearest


def _solve(plan: QuantPlan, fit: Fit) -> list[Pass]:
    return [QuantizeWeights(plan, nearest)]


METHOD = Method(
    name="rtn",
    summary="weights and activations rounded to nearest",
    needs_calibration=False,
    formats=WEIGHT_ONLY | INTEGER,
    solve=_solve,
)
