"""Tiny graphs for the tests of passes: written node by node, copied, counted."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from passes.graph import attributes, calls, drop_unused

aten, ops = torch.ops.aten, torch.ops.dllmc
HALVES = tuple((-1, start, 2**63 - 1, 2) for start in (0, 1))  # arguments of `slice`: even rows, odd rows


class Sketch:
    """A graph in the making: `sketch(op, ...)` adds a call, `output` closes it."""

    def __init__(self) -> None:
        self._graph = Graph()
        self._weights: dict[str, Tensor] = {}

    def input(self, name: str) -> Node:
        return self._graph.placeholder(name)

    def weight(self, name: str, value: Tensor) -> Node:
        self._weights[name] = value
        return self._graph.get_attr(name)

    def __call__(self, op: Callable[..., object], *arguments: Any, **keywords: Any) -> Node:
        return self._graph.call_function(op, arguments, keywords)

    def linear(self, x: Node, site: str, weight: Tensor, bias: Tensor | None = None) -> Node:
        parts = [self.weight(f"{site}.weight", weight)]
        parts += [] if bias is None else [self.weight(f"{site}.bias", bias)]
        return self(aten.linear.default, x, *parts)

    def output(self, *values: Node) -> GraphModule:
        self._graph.output(values[0] if len(values) == 1 else values)
        return GraphModule(self._weights, self._graph)


def copy_of(graph: GraphModule) -> GraphModule:
    """A graph that passes may edit while `graph` stays as it is; weights are shared."""
    made = Graph()
    made.output(made.graph_copy(graph.graph, {}))
    made.set_codegen(graph.graph._codegen)
    return GraphModule(dict(attributes(graph)), made)


def count(graph: GraphModule, op: object) -> int:
    """How many times the graph calls `op`."""
    return len(list(calls(graph, op)))


def only(graph: GraphModule, op: object) -> Node:
    """The one call of `op`."""
    (node,) = calls(graph, op)
    return node


def assert_untouched(graph: GraphModule, edit: Callable[[GraphModule], int]) -> None:
    """`edit` finds nothing and leaves every node and weight where it was."""
    text, weights = str(graph.graph), attributes(graph)
    assert edit(graph) == 0
    assert str(graph.graph) == text
    assert attributes(graph) == weights  # the very same tensors: a tensor equals itself by identity in a dict


def edited(graph: GraphModule, *edits: Callable[[GraphModule], int]) -> tuple[GraphModule, list[int]]:
    """A copy after `edits`, tidied, and how many places each changed."""
    made = copy_of(graph)
    counts = [edit(made) for edit in edits]
    drop_unused(made)
    made.graph.lint()
    made.recompile()
    return made, counts


def whole_numbers(*shape: int, limit: int = 4) -> Tensor:
    """Small integers in float32: sums of their products are exact in any order."""
    return torch.randint(-limit, limit + 1, shape).float()
