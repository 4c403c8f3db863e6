"""QuaRot (arXiv 2404.00456): Hadamard rotations of stream, values and keys in the weights, the rest at run time.

With float activations there is nothing to do at run time: only what folds into the weights is rotated.
"""

from dataclasses import replace

from torch import Tensor

from passes.base import Pass
from passes.fit import Fit
from passes.fold_norm import FoldNorm
from passes.insert_hadamard import InsertHadamard
from passes.methods.gptq import solve_by_gptq
from passes.methods.method import INTEGER, WEIGHT_ONLY, Method
from passes.quant_spec import QuantPlan, QuantSpec
from passes.quantize_weights import QuantizeWeights, nearest
from passes.rotate_keys import RotateKeys
from passes.rotate_stream import RotateStream
from passes.rotate_values import RotateValues
from passes.solvers.clip import clip_ratios
from passes.solvers.grid import Grid


def _rewrite(plan: QuantPlan, fit: Fit) -> list[Pass]:
    # Values are rotated while attention still stands right before the linear that reads it.
    passes: list[Pass] = [FoldNorm(), RotateStream(fit.seed), RotateValues(fit.seed)]
    if plan.attention.k_bits < 16:
        passes.append(RotateKeys(fit.seed))
    return [*passes, InsertHadamard(replace(plan, head=None), fit.seed)]


def _solve(plan: QuantPlan, fit: Fit) -> list[Pass]:
    options = plan.options.quarot
    if options.weights == "gptq":
        return solve_by_gptq(plan, fit, clip=options.clip_weights)
    return [QuantizeWeights(plan, _nearest_clipped if options.clip_weights else nearest)]


def _nearest_clipped(site: str, weight: Tensor, spec: QuantSpec) -> Grid:
    if weight.is_meta:
        return nearest(site, weight, spec)
    clip = clip_ratios(weight, bits=spec.w_bits, group=spec.w_group, symmetric=spec.w_symmetric)
    return nearest(site, weight, spec, clip)


METHOD = Method(
    name="quarot",
    summary="Hadamard rotations of everything that is quantised",
    needs_calibration=True,
    formats=WEIGHT_ONLY | INTEGER,
    rewrite=_rewrite,
    solve=_solve,
    inputs="quantized",
    rotates_stream=True,
)
