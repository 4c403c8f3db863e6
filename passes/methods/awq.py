"""AWQ (arXiv 2306.00978): scales of channels, then clips, each searched by the error of the linear's output.

With integer activations the same, then activations rounded per token: the objective is of the weights alone.
"""

import torch
from torch import Tensor
from torch.fx import GraphModule

from passes.base import Pass
from passes.fit import Fit
from passes.fold_scale import FoldScale
from passes.magnitudes import linears_at_hand, magnitudes, needed, sample_rows
from passes.methods.method import INTEGER, WEIGHT_ONLY, Method
from passes.producers import query_key_rows, scalable
from passes.quant_spec import QuantPlan, QuantSpec
from passes.quantize_weights import QuantizeWeights, float_weight, nearest
from passes.solvers.awq import Requantize, search_clip, search_scale
from passes.solvers.grid import Grid


class SearchScales:
    """Scales of every linear that the plan quantises, all found on the weights as they are, then folded."""

    def __init__(self, plan: QuantPlan, fit: Fit) -> None:
        self.plan, self.fit = plan, fit

    def __call__(self, graph: GraphModule) -> int:
        linears, options = linears_at_hand(graph, self.plan), self.plan.options.awq
        if not linears:
            return 0
        samples = needed(self.fit)
        inputs = magnitudes(graph, samples)
        rows = sample_rows(graph, samples, limit=options.rows, seed=self.fit.seed)
        scales: dict[str, Tensor] = {}
        for site, (linear, spec) in linears.items():
            magnitude = scalable(graph, linear).tie(inputs[site].mean, "mean")
            found = search_scale(
                float_weight(graph, linear), rows[site], magnitude, _requantize(spec), steps=options.grid
            )
            scales[site] = found.scale
        return FoldScale(scales.get)(graph)


class RoundClipped:
    """Weights to nearest on grids whose ranges are clipped where that lowers the error of the outputs.

    Rows that make queries and keys keep their range, as in the released code: an error in them acts through a product
    of two such rows, which the objective does not see.
    """

    def __init__(self, plan: QuantPlan, fit: Fit) -> None:
        self.plan, self.fit = plan, fit

    def __call__(self, graph: GraphModule) -> int:
        linears, options = linears_at_hand(graph, self.plan), self.plan.options.awq
        clips: dict[str, Tensor] = {}
        if linears and options.clip:
            rows = sample_rows(graph, needed(self.fit), limit=options.rows, seed=self.fit.seed)
            for site, (linear, spec) in linears.items():
                clips[site] = search_clip(
                    float_weight(graph, linear),
                    rows[site],
                    _requantize(spec),
                    group=spec.w_group,
                    steps=options.clip_steps,
                    lowest=options.min_clip,
                )
                clips[site][query_key_rows(graph, linear)] = 1.0

        def solve(site: str, weight: Tensor, spec: QuantSpec) -> Grid:
            return nearest(site, weight, spec, clips.get(site))

        return QuantizeWeights(self.plan, solve)(graph)


def _requantize(spec: QuantSpec) -> Requantize:
    def values(weight: Tensor, clip: Tensor | None) -> Tensor:
        grid = nearest("", weight, spec, clip)
        found: Tensor = torch.ops.dllmc.dequantize(grid.codes, grid.scale, spec.w_bits, spec.w_group, grid.zero)
        return found

    return values


def _rewrite(plan: QuantPlan, fit: Fit) -> list[Pass]:
    return [SearchScales(plan, fit)]


def _solve(plan: QuantPlan, fit: Fit) -> list[Pass]:
    return [RoundClipped(plan, fit)]


METHOD = Method(
    name="awq",
    summary="scales and clips searched by the error of each linear's output",
    needs_calibration=True,
    formats=WEIGHT_ONLY | INTEGER,
    rewrite=_rewrite,
    solve=_solve,
)
