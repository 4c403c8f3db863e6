"""Clip the range of quantised activations by one ratio: values beyond it saturate, the others get finer steps."""

import torch
from torch.fx import GraphModule

from passes.fit import Fit
from passes.graph import calls, site_of
from passes.quant_spec import QuantPlan


class ClipActivations:
    """Every linear whose activations the plan quantises; `fit.numbers` take the ratio for where they are quantised."""

    def __init__(self, plan: QuantPlan, fit: Fit, ratio: float) -> None:
        self.plan, self.fit, self.ratio = plan, fit, ratio

    def __call__(self, graph: GraphModule) -> int:
        count = 0
        for linear in calls(graph, torch.ops.aten.linear.default):
            site = site_of(linear)
            spec = self.plan.spec(site)
            if spec is not None and spec.a_bits < 16:
                self.fit.numbers.update({f"{site}.clip_lo": self.ratio, f"{site}.clip_hi": self.ratio})
                count += 1
        return count
