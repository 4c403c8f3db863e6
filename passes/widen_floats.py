"""Compute the float parts of a simulated graph in float64, rounded to float32 once where each ends.

    linear, rms_norm, silu, attention:  op(x, ...) -> to_float32(op(to_float64(x), ...))

A quantiser turns a difference in the last place into a whole step where a value lies at a half. What a simulation is to
show is the quantiser, not the order in which float32 sums were taken, so its own rounding is made as small as can be.
"""

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from passes.graph import calls

aten = torch.ops.aten
WIDENED = (
    aten.linear.default,
    aten.rms_norm.default,
    aten.silu.default,
    aten.scaled_dot_product_attention.default,
)
MASK = 3  # attention's mask is no number


class WidenFloats:
    """Idempotent: what is wide already is left alone."""

    def __call__(self, graph: GraphModule) -> int:
        count = 0
        for node in [node for op in WIDENED for node in calls(graph, op)]:
            if any(user.target is aten.to.dtype and user.args[1] is torch.float32 for user in node.users):
                continue
            self._widen(graph, node)
            count += 1
        return count

    @staticmethod
    def _widen(graph: GraphModule, node: Node) -> None:
        attention = node.target is aten.scaled_dot_product_attention.default
        with graph.graph.inserting_before(node):
            wide = [
                argument
                if attention and place == MASK
                else map_arg(argument, lambda x: graph.graph.call_function(aten.to.dtype, (x, torch.float64)))
                for place, argument in enumerate(node.args)
            ]
        with graph.graph.inserting_after(node):
            narrow = graph.graph.call_function(aten.to.dtype, (node, torch.float32))
        node.replace_all_uses_with(narrow, delete_user_cb=lambda user: user is not narrow)
        node.args = tuple(wide)
