"""Smooth outliers of activations into the weights, by scales of channels (SmoothQuant, arXiv 2211.10438)."""

from torch import Tensor
from torch.fx import GraphModule

from passes.fit import Fit
from passes.fold_scale import FoldScale
from passes.magnitudes import linears_at_hand, magnitudes, needed
from passes.producers import scalable
from passes.quant_spec import QuantPlan
from passes.quantize_weights import float_weight
from passes.solvers.smooth import smoothing_scale


class SmoothScales:
    """Every linear of the blocks that the plan quantises; channels made by one row of v count together."""

    def __init__(self, plan: QuantPlan, fit: Fit, *, alpha: float) -> None:
        self.plan, self.fit, self.alpha = plan, fit, alpha

    def __call__(self, graph: GraphModule) -> int:
        linears = linears_at_hand(graph, self.plan)
        if not linears:
            return 0
        inputs = magnitudes(graph, needed(self.fit))
        scales: dict[str, Tensor] = {}
        for site, (linear, _) in linears.items():
            tie = scalable(graph, linear).tie
            largest = float_weight(graph, linear).abs().amax(0)
            scales[site] = smoothing_scale(tie(inputs[site].amax, "amax"), tie(largest, "amax"), self.alpha)
        return FoldScale(scales.get)(graph)
