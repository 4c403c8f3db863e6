"""Rotate the input of linears block by block, deal channels out anew, rotate again, and fold the inverse into weights.

    linear(x, W)  ->  linear(rotate(rotate(x, B1, 0..K-1), B2, order), rotate(rotate(W, B1, 0..K-1), B2, order))

Exact in real numbers for any activations, since both rotations are orthogonal; what is learned is which of them
(DuQuant, arXiv 2406.01721, section 3). Shape letters: M rows, K channels, c channels a block.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from passes.fit import Fit
from passes.graph import add_attribute, attribute, attribute_name, calls, node_of, site_of, update_attributes
from passes.magnitudes import largest_rows, needed
from passes.quant_spec import QuantPlan
from passes.solvers.draws import generator
from passes.solvers.greedy_rotation import greedy_rotation
from passes.solvers.kronecker import by_parts
from passes.solvers.zigzag import zigzag

aten, ops = torch.ops.aten, torch.ops.dllmc
# Calibration rows a site: those with the largest values, since it is the largest that each step lowers. What zigzag
# deals out are the channels' peaks over these rows alone; the released code takes the mean of the hidden sequences.
ROWS = 256


@dataclass(frozen=True)
class BlockRotation:
    """`dllmc::rotate` without its input: blocks float32 [K/c, c, c] after order int64 [K]."""

    blocks: Tensor
    order: Tensor

    def apply(self, rows: Tensor) -> Tensor:
        """Rows [M, K] turned."""
        blocks = self.blocks.double()  # once, and not by `rotate` for each part
        return by_parts(rows, lambda part: ops.rotate(part, blocks, self.order))


class InsertRotation:
    """Every linear whose activations the plan quantises; blocks are the largest divisor of K up to `block` channels.

    Raises CalibrationError for inputs that are not finite, ValueError without samples for weights that have values.
    """

    def __init__(self, plan: QuantPlan, fit: Fit, *, block: int, steps: int) -> None:
        self.plan, self.fit, self.block, self.steps = plan, fit, block, steps

    def __call__(self, graph: GraphModule) -> int:
        linears = [linear for linear in calls(graph, aten.linear.default) if self._is_planned(linear)]
        rows: dict[str, Tensor] = {}
        if any(not attribute(graph, node_of(linear.args[1])).is_meta for linear in linears):
            rows = largest_rows(graph, needed(self.fit), limit=ROWS)
        for linear in linears:
            site, source = site_of(linear), node_of(linear.args[1])
            weight = attribute(graph, source)
            if weight.is_meta:
                turns = self._shapes(weight.shape[1])
            else:
                turns = self._learned(site, rows[site])
                for turn in turns:
                    weight = turn.apply(weight)
                update_attributes(graph, {attribute_name(source): weight})
            self._insert(graph, linear, turns)
        return len(linears)

    def _is_planned(self, linear: Node) -> bool:
        spec = self.plan.spec(site_of(linear))
        return spec is not None and spec.a_bits < 16

    def _learned(self, site: str, rows: Tensor) -> list[BlockRotation]:
        size, order = self._size(rows.shape[1]), torch.arange(rows.shape[1])
        turns: list[BlockRotation] = []
        for number in ("first", "second"):
            draw = generator(self.fit.seed, site, number)
            turns.append(BlockRotation(greedy_rotation(rows[:, order], size, self.steps, draw).float(), order))
            rows = turns[-1].apply(rows)
            order = zigzag(rows.abs().amax(dim=0), size)
        return turns

    def _shapes(self, width: int) -> list[BlockRotation]:
        size = self._size(width)
        with torch.device("meta"):
            shapes = torch.empty(width // size, size, size), torch.empty(width, dtype=torch.int64)
            return [BlockRotation(*shapes), BlockRotation(*(shape.clone() for shape in shapes))]

    def _size(self, width: int) -> int:
        return next(size for size in range(min(self.block, width), 0, -1) if width % size == 0)

    @staticmethod
    def _insert(graph: GraphModule, linear: Node, turns: Sequence[BlockRotation]) -> None:
        x = node_of(linear.args[0])
        with graph.graph.inserting_before(linear):
            for number, turn in enumerate(turns, start=1):
                name = f"{site_of(linear)}.rotation_{number}"
                blocks = add_attribute(graph, f"{name}.blocks", turn.blocks)
                order = add_attribute(graph, f"{name}.order", turn.order)
                x = graph.graph.call_function(ops.rotate.default, (x, blocks, order))
        linear.update_arg(0, x)
