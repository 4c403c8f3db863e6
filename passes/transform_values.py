"""Transform the values of attention head by head, for nothing at run time.

    rows of v:  W_v -> A^T W_v, b_v -> A^T b_v        columns of o, for each head that reads them:  W_o -> W_o A^-T

Exact in real numbers: attention mixes tokens, the transform mixes channels. Each value head j has its own invertible
A_j [C, C], or all have one; query heads that share a value head share its A.
Shape letters: J value heads, C channels a head, N outputs, K inner.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from passes.graph import attribute, attribute_name, calls, node_of, site_of, update_attributes
from passes.producers import Producer, attention_before, head_size, producer_of

aten = torch.ops.aten
APART = 1e-6  # how far A A^-1 may lie from the identity


@dataclass(frozen=True, kw_only=True)
class ValueTransform:
    """`fold` A and `unfold` A^-T, float64 [C, C] for all value heads or [J, C, C] for each."""

    fold: Tensor
    unfold: Tensor


# (site that reads the attention, C) -> transform, None to leave it alone
ValueSolver = Callable[[str, int], ValueTransform | None]


class TransformValues:
    """Every attention; on shapes alone nothing is solved for.

    Raises ValueError for an attention whose values no linear makes or that no linear reads, and for transforms of
    other shapes or whose `unfold` is not their inverse.
    """

    def __init__(self, solve: ValueSolver) -> None:
        self.solve = solve

    def __call__(self, graph: GraphModule) -> int:
        seen = changed = 0
        for linear in calls(graph, aten.linear.default):
            producer = producer_of(graph, linear)
            if producer is None or producer.through != "attention":
                continue
            seen += 1
            if attribute(graph, producer.weight).is_meta:
                changed += 1
                continue
            found = self.solve(site_of(linear), head_size(attention_before(linear)))
            if found is not None:
                self._transform(graph, linear, producer, found)
                changed += 1
        if seen != len(list(calls(graph, aten.scaled_dot_product_attention.default))):
            raise ValueError("an attention does not stand between two float linears")
        return changed

    @staticmethod
    def _transform(graph: GraphModule, linear: Node, producer: Producer, found: ValueTransform) -> None:
        rows, size = torch.unique(producer.rows), head_size(attention_before(linear))
        _check(found, site_of(linear), len(rows) // size, size)
        repeats = len(producer.rows) // len(rows)
        unfold = found.unfold if found.unfold.dim() == 2 else found.unfold.repeat_interleave(repeats, dim=0)
        source = node_of(linear.args[1])
        changed = {attribute_name(source): _by_head(attribute(graph, source), unfold)}
        for node in (producer.weight, producer.bias):
            if node is not None:
                made = attribute(graph, node).clone()
                made[rows] = _by_head(made[rows].movedim(0, -1), found.fold).movedim(-1, 0)
                changed[attribute_name(node)] = made
        update_attributes(graph, changed)


def _check(found: ValueTransform, site: str, heads: int, size: int) -> None:
    shapes = {found.fold.shape, found.unfold.shape}
    if shapes not in ({(size, size)}, {(heads, size, size)}):
        raise ValueError(f"transforms of {heads} value heads of {size} channels at {site} have shapes {shapes}")
    one = torch.eye(size, dtype=torch.float64)
    if not bool((found.fold @ found.unfold.mT - one).abs().max() <= APART):
        raise ValueError(f"the transforms of values at {site} are not given with their inverses")


def _by_head(rows: Tensor, matrices: Tensor) -> Tensor:
    """Rows [..., K], each head's C channels times its matrix."""
    heads = torch.unflatten(rows.double(), -1, (-1, matrices.shape[-1]))
    turned = heads @ matrices if matrices.dim() == 2 else torch.einsum("...hc,hcd->...hd", heads, matrices)
    return turned.flatten(-2).to(rows.dtype)
