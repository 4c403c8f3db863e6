"""Rotate the residual stream: every weight that writes it or reads it turns with it, and no node is added.

    embedding(E, ids)            ->  embedding(E Q, ids)
    x + linear(y, W, b)          ->  x + linear(y, Q^T W, Q^T b)
    linear(rms_norm(x, 1), W)    ->  linear(rms_norm(x, 1), W Q)

Exact in real numbers, since a norm without gain commutes with a rotation; gains are folded first (`fold_norm`). One Q
serves the whole model: each piece turns the weights that stand in it (QuaRot, arXiv 2404.00456, stage 1a).
"""

import torch
from torch.fx import GraphModule, Node

from passes.graph import attribute, attribute_name, calls, is_attribute, is_call, node_of, update_attributes
from passes.solvers.draws import generator
from passes.solvers.kronecker import Rotation, hadamard_rotation

aten = torch.ops.aten


def stream_rotation(width: int, seed: int) -> Rotation:
    """The one rotation of a residual stream of `width` channels that belongs to `seed`."""
    return hadamard_rotation(width, generator(seed, "stream"))


class RotateStream:
    """Raises ValueError for a norm with a gain left, or a norm whose values something but a linear reads."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __call__(self, graph: GraphModule) -> int:
        turned: set[str] = set()
        for lookup in calls(graph, aten.embedding.default):
            self._turn(graph, turned, lookup.args[0], rows=True)
        for norm in calls(graph, aten.rms_norm.default):
            for reader in _readers(graph, norm):
                self._turn(graph, turned, reader.args[1], rows=True)
        for linear in calls(graph, aten.linear.default):
            if any(is_call(user, aten.add.Tensor) for user in linear.users):
                for value in linear.args[1:]:
                    self._turn(graph, turned, value, rows=False)
        return len(turned)

    def _turn(self, graph: GraphModule, turned: set[str], value: object, *, rows: bool) -> None:
        """Each row of a weight (or a bias), or each column; one by one, so that one weight at a time is there twice."""
        node = node_of(value)
        weight, name = attribute(graph, node), attribute_name(node)
        if name in turned:
            raise ValueError(f"{name} both reads and writes the residual stream, or does one twice")
        turned.add(name)
        if weight.is_meta:
            return
        if rows or weight.dim() == 1:
            made = stream_rotation(weight.shape[-1], self.seed).apply(weight)
        else:
            made = stream_rotation(weight.shape[0], self.seed).apply(weight.T).T.contiguous()
        update_attributes(graph, {name: made})


def _readers(graph: GraphModule, norm: Node) -> list[Node]:
    gain = norm.args[2] if len(norm.args) > 2 else None
    if gain is not None:
        value = attribute(graph, node_of(gain))
        if not value.is_meta and not bool((value == 1).all()):
            raise ValueError(f"{attribute_name(node_of(gain))} does not commute with a rotation; fold it first")
    readers = list(norm.users)
    if not all(is_call(reader, aten.linear.default) and is_attribute(reader.args[1]) for reader in readers):
        raise ValueError(f"something besides float linears reads {norm.name}")
    return readers
