"""DuQuant (arXiv 2406.01721): smoothed, rotated block by block, dealt out by zigzag, rotated again; constant clips.

With rounded weights (the default) the constant clip is theirs; GPTQ searches its own.
"""

from dataclasses import replace

import torch
from torch import Tensor

from passes.base import Pass
from passes.clip_activations import ClipActivations
from passes.fit import Fit
from passes.insert_rotation import InsertRotation
from passes.methods.gptq import solve_by_gptq
from passes.methods.method import INTEGER, Method
from passes.quant_spec import QuantPlan, QuantSpec
from passes.quantize_weights import QuantizeWeights, nearest
from passes.rotate_keys import RotateKeys
from passes.smooth_scales import SmoothScales
from passes.solvers.grid import Grid


def _rewrite(plan: QuantPlan, fit: Fit) -> list[Pass]:
    options, blocks = plan.options.duquant, replace(plan, head=None)
    # The study rotates queries and keys by a Hadamard matrix where it rounds them.
    keys: list[Pass] = [RotateKeys(fit.seed)] if plan.attention.k_bits < 16 else []
    return [
        *keys,
        SmoothScales(blocks, fit, alpha=options.alpha),
        InsertRotation(blocks, fit, block=options.block, steps=options.steps),
        ClipActivations(blocks, fit, options.a_clip),
    ]


def _solve(plan: QuantPlan, fit: Fit) -> list[Pass]:
    options = plan.options.duquant
    if options.weights == "gptq":
        return solve_by_gptq(plan, fit, clip=True)

    def clipped(site: str, weight: Tensor, spec: QuantSpec) -> Grid:
        rows, inner = weight.shape
        clip = torch.full((rows, inner // (spec.w_group or inner)), options.w_clip, device=weight.device)
        return nearest(site, weight, spec, clip)

    return [QuantizeWeights(plan, clipped)]


METHOD = Method(
    name="duquant",
    summary="smoothing, learned block rotations and a zigzag permutation",
    needs_calibration=True,
    formats=INTEGER,
    rewrite=_rewrite,
    solve=_solve,
)
