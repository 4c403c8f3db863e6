"""Run a graph and show what enters or leaves each linear on the way."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from passes.graph import site_of

Watcher = Callable[[str, Tensor, Tensor], None]


class Observed(Interpreter):
    """`watch(site, input, output)` is called for every linear of the graph, in order."""

    def __init__(self, graph: GraphModule, watch: Watcher) -> None:
        super().__init__(graph)
        self.watch = watch
        self.extra_traceback = False  # what a watcher raises is meant for the user, word for word

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if n.op == "call_function" and n.target is torch.ops.aten.linear.default:
            self.watch(site_of(n), self.env[n.args[0]], result)  # type: ignore[index]
        return result
