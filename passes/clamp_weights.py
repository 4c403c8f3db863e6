"""Let weights saturate where a method learned to: beyond a ratio of the largest magnitude of their row or group.

The grid that is then fitted to them, by whatever solver, has its largest code at that ratio (FlatQuant, arXiv
2410.09426). Shape letters: N outputs, K inner, G groups.
"""

import torch
from torch.fx import GraphModule

from passes.fit import Fit
from passes.graph import attribute_name, node_of, update_attributes
from passes.quant_spec import QuantPlan
from passes.quantize_weights import float_weight, planned


class ClampWeights:
    """Linears of the plan that have ratios [N, G] in `fit.tensors` under `<site>.w_clip`: on shapes alone none has."""

    def __init__(self, plan: QuantPlan, fit: Fit) -> None:
        self.plan, self.fit = plan, fit

    def __call__(self, graph: GraphModule) -> int:
        clamped = {}
        for linear, site, spec in planned(graph, self.plan):
            ratios = self.fit.tensors.get(f"{site}.w_clip")
            if ratios is None:
                continue
            weight = float_weight(graph, linear)
            groups = torch.unflatten(weight, 1, (-1, spec.w_group or weight.shape[1]))
            limit = groups.abs().amax(dim=-1, keepdim=True) * ratios[..., None]
            clamped[attribute_name(node_of(linear.args[1]))] = groups.clamp(-limit, limit).flatten(1)
        update_attributes(graph, clamped)
        return len(clamped)
