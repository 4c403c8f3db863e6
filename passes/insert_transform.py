"""Transform the input of linears by Kronecker factors and fold the inverse into their weights.

    linear(x, W)  ->  linear(prepare(x, left, right), W (left kron right)^-T)

Exact in real numbers for any invertible factors; `left` and `right` are stored beside the weight.
Shape letters: N outputs, K inner, a x b = K the Kronecker factors.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from passes.fold_norm import num_readers
from passes.graph import (
    add_attribute,
    attribute,
    attribute_name,
    calls,
    is_attribute,
    is_call,
    node_of,
    site_of,
    update_attributes,
)
from passes.solvers.kronecker import fold_kronecker
from plugins.prepare import PREPARE

aten, ops = torch.ops.aten, torch.ops.dllmc


@dataclass(frozen=True, kw_only=True)
class Transform:
    """x -> x (left [a, a] kron right [b, b])."""

    left: Tensor
    right: Tensor


# site -> transform of its input, None for a site without; on the meta device only shapes count
TransformSolver = Callable[[str], Transform | None]


class InsertTransform:
    """Every linear that `solve` has a transform for.

    A `prepare` without a transform before the linear takes it in. Raises ValueError where one stands already, and for
    factors that do not fit.
    """

    def __init__(self, solve: TransformSolver) -> None:
        self.solve = solve

    def __call__(self, graph: GraphModule) -> int:
        count = 0
        for linear in calls(graph, aten.linear.default):
            transform = self.solve(site_of(linear)) if is_attribute(linear.args[1]) else None
            if transform is not None:
                self._insert(graph, linear, self._fold(graph, linear, transform))
                count += 1
        return count

    @staticmethod
    def _fold(graph: GraphModule, linear: Node, transform: Transform) -> tuple[Tensor, Tensor]:
        """Factors as they are stored, once the weight of `linear` has their inverse."""
        source = node_of(linear.args[1])
        weight, site = attribute(graph, source), site_of(linear)
        shapes = transform.left.shape, transform.right.shape
        if transform.left.shape[0] * transform.right.shape[0] != weight.shape[1]:
            raise ValueError(f"factors {shapes} do not fit the {weight.shape[1]} input channels of {site}")
        if num_readers(graph, source) != 1:
            raise ValueError(f"the weight of {site} is read elsewhere too")
        if weight.is_meta:
            left, right = (torch.empty(shape, device="meta") for shape in shapes)
            return left, right
        # The inverse is that of the float32 factors which are stored, not of those that were solved for.
        left, right = transform.left.float(), transform.right.float()
        update_attributes(graph, {attribute_name(source): fold_kronecker(weight, left, right)})
        return left, right

    @staticmethod
    def _insert(graph: GraphModule, linear: Node, factors: tuple[Tensor, Tensor]) -> None:
        site, x = site_of(linear), node_of(linear.args[0])
        given = PREPARE.arguments(*(x.args if is_call(x, ops.prepare.default) else (x,)))
        if given["left"] is not None:
            raise ValueError(f"the input of {site} is transformed already")
        with graph.graph.inserting_before(linear):
            for side, factor in zip(("left", "right"), factors, strict=True):
                given[side] = add_attribute(graph, f"{site}.{side}", factor)
            linear.update_arg(0, graph.graph.call_function(ops.prepare.default, tuple(given.values())))
