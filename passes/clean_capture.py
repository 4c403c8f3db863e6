"""Remove what `torch.export` records but nobody needs: assertions, conversions to the same type, full slices."""

import torch
from torch.fx import GraphModule, Node

from passes.graph import calls, node_of

FULL = 2**63 - 1
aten = torch.ops.aten


class CleanCapture:
    """`to(x, x.dtype) -> x`, `slice(x, d, 0, end) -> x`, `detach(x) -> x`, metadata assertions dropped."""

    def __call__(self, graph: GraphModule) -> int:
        count = 0
        for node in calls(graph, aten._assert_tensor_metadata.default):
            graph.graph.erase_node(node)
            count += 1
        for node in [n for op in (aten.to.dtype, aten.slice.Tensor, aten.detach.default) for n in calls(graph, op)]:
            if self._changes_nothing(node):
                node.replace_all_uses_with(node_of(node.args[0]))
                graph.graph.erase_node(node)
                count += 1
        return count

    @staticmethod
    def _changes_nothing(node: Node) -> bool:
        if node.target is aten.to.dtype:
            return bool(node_of(node.args[0]).meta["val"].dtype == node.args[1])
        if node.target is aten.slice.Tensor:
            return tuple(node.args[2:4]) == (0, FULL) and len(node.args) == 4
        return True
