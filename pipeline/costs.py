"""What quantisation adds to every token at run time: multiply-adds and stored values, counted from the whole graph.

    Kronecker transform   K (a + b)        a^2 + b^2 values
    TAC                   K g              K g + K values
    rotation              K c              K c values and the order of K channels
    channel scale         K                K values

All are shares of the linears of the blocks. Embedding and LM head are left out of both sides, which makes the shares
larger; so are the grids, gates and norms, where nothing is multiplied that full precision does not.
Shape letters: K inner, a x b = K the Kronecker factors, g channels a TAC block, c channels a rotated block.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from passes.graph import site_of
from pipeline.capture import whole_inputs
from pipeline.models.config import ModelConfig
from plugins.prepare import PREPARE

aten, ops = torch.ops.aten, torch.ops.dllmc

BLOCKS = "blocks."


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of all blocks: multiply-adds a token, and how many numbers are stored."""

    multiply_adds: int = 0
    parameters: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            multiply_adds=self.multiply_adds + other.multiply_adds, parameters=self.parameters + other.parameters
        )


@dataclass(frozen=True, kw_only=True)
class Costs:
    """The linears of the blocks, and what stands before them, by kind: transform, TAC, rotation, scale."""

    linears: Cost
    added: Mapping[str, Cost]

    @property
    def multiply_adds(self) -> float:
        """Extra ones as a share of those of the linears."""
        return sum(cost.multiply_adds for cost in self.added.values()) / self.linears.multiply_adds

    @property
    def parameters(self) -> float:
        """Extra ones as a share of the weights of the linears."""
        return sum(cost.parameters for cost in self.added.values()) / self.linears.parameters


def run_time_costs(graph: GraphModule, config: ModelConfig) -> Costs:
    """Counts of a simulated whole graph on the meta device; shapes are those that its ops give, row by row."""
    example, _ = whole_inputs(config)
    counter = _Counter(graph, tokens=example[0].numel())
    counter.run(*example)
    return Costs(linears=counter.linears, added=counter.added)


def _linear(x: Tensor, weight: Tensor, *_: object) -> dict[str, Cost]:
    return {"linear": Cost(multiply_adds=weight.numel(), parameters=weight.numel())}


def _prepare(*given: Any) -> dict[str, Cost]:
    values = PREPARE.arguments(*given)
    width = values["x"].shape[-1]
    found = {}
    if values["left"] is not None:
        left, right = values["left"], values["right"]
        found["transform"] = Cost(
            multiply_adds=width * (left.shape[0] + right.shape[0]), parameters=left.numel() + right.numel()
        )
    if values["tac_matrix"] is not None:
        matrix = values["tac_matrix"]
        found["TAC"] = Cost(multiply_adds=matrix.numel(), parameters=matrix.numel() + values["tac_bias"].numel())
    if values["channel_scale"] is not None:
        found["scale"] = Cost(multiply_adds=width, parameters=width)
    return found


def _rotate(x: Tensor, blocks: Tensor, order: Tensor) -> dict[str, Cost]:
    channels = blocks.numel()  # K / c blocks of c x c: c multiply-adds a channel
    return {"rotation": Cost(multiply_adds=channels, parameters=channels + order.numel())}


# Op -> what one row of its input costs, and what the op stores, by kind.
COUNTED: dict[object, Callable[..., dict[str, Cost]]] = {
    aten.linear.default: _linear,
    ops.prepare.default: _prepare,
    ops.rotate.default: _rotate,
}


class _Counter(Interpreter):
    """Runs a graph on shapes and adds up what its nodes cost."""

    def __init__(self, graph: GraphModule, *, tokens: int) -> None:
        super().__init__(graph)
        self.tokens = tokens
        self.linears = Cost()
        self.added: dict[str, Cost] = {}

    def run_node(self, n: Node) -> Any:
        if n.op == "call_function" and n.target in COUNTED and not _is_end(n):
            given, _ = self.fetch_args_kwargs_from_env(n)
            rows = math.prod(given[0].shape[:-1])
            for kind, cost in COUNTED[n.target](*given).items():
                self._add(
                    kind, Cost(multiply_adds=cost.multiply_adds * rows // self.tokens, parameters=cost.parameters)
                )
        return super().run_node(n)

    def _add(self, kind: str, cost: Cost) -> None:
        if kind == "linear":
            self.linears += cost
        else:
            self.added[kind] = self.added.get(kind, Cost()) + cost


def _is_end(node: Node) -> bool:
    """Whether it is the LM head, which reads rows of its own."""
    return node.target is aten.linear.default and not site_of(node).startswith(BLOCKS)
