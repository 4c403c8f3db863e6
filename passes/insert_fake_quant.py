"""Simulate quantised activations: `linear(x, ...)` -> `linear(fake_quant(x), ...)`, once for each input and format."""

from collections.abc import Mapping

import torch
from torch.fx import GraphModule, Node

from passes.graph import calls, node_of, site_of
from passes.quant_spec import QuantPlan

ops = torch.ops.dllmc


class InsertFakeQuant:
    """Every linear whose activations the plan quantises; inputs shared by linears are quantised once.

    `numbers` hold a site's clip ratios under `<site>.clip_lo` and `<site>.clip_hi` where a method clips.
    """

    def __init__(self, plan: QuantPlan, numbers: Mapping[str, float] | None = None) -> None:
        self.plan, self.numbers = plan, {} if numbers is None else numbers

    def __call__(self, graph: GraphModule) -> int:
        made: dict[tuple[object, ...], Node] = {}
        count = 0
        for linear in calls(graph, torch.ops.aten.linear.default):
            site = site_of(linear)
            spec = self.plan.spec(site)
            source = node_of(linear.args[0])
            if spec is None or spec.a_bits >= 16 or source.target is ops.fake_quant.default:
                continue
            clip_lo, clip_hi = (self.numbers.get(f"{site}.{end}", 1.0) for end in ("clip_lo", "clip_hi"))
            arguments = (source, spec.a_bits, spec.symmetric, spec.a_group, clip_lo, clip_hi)
            if arguments not in made:
                with graph.graph.inserting_after(source):
                    made[arguments] = graph.graph.call_function(ops.fake_quant.default, arguments)
            linear.update_arg(0, made[arguments])
            count += 1
        return count
