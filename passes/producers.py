"""What makes the input channels of a linear, where that is linear: divide it, multiply W's column, and nothing changes.

    linear(rms_norm(x, g), W)                                 channel k by element k of the gain
    linear(flatten(transpose(attention(q, k, v))), W)         channel by a row of v, which a group of heads shares (GQA)
    linear(silu(y[..., 0::2]) * y[..., 1::2], W)              channel k by row 2k + 1 of y

Shape letters: K input channels of the linear, H query heads, J key/value heads, C channels a head.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from passes.fold_norm import num_readers
from passes.graph import attribute, calls, int_of, is_attribute, is_call, node_of, site_of

aten = torch.ops.aten
END = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class Producer:
    """Element or row `rows[k]` of `weight` (and of `bias`) makes channel k; rows int64 [K]."""

    weight: Node
    bias: Node | None
    rows: Tensor
    through: Literal["norm", "attention", "swiglu"]

    def tie(self, values: Tensor, reduce: Literal["amax", "mean"]) -> Tensor:
        """`values` [K], joined over the channels that share a row."""
        size = int(self.rows.max()) + 1
        joined = values.new_zeros(size).scatter_reduce(0, self.rows, values, reduce, include_self=False)
        return joined[self.rows]


def producer_of(graph: GraphModule, linear: Node) -> Producer | None:
    """What makes the input of `linear`; None where that is not linear, or something else reads it."""
    weight = linear.args[1]
    source = node_of(linear.args[0])
    if not is_attribute(weight) or len(source.users) != 1:
        return None
    width = attribute(graph, node_of(weight)).shape[1]
    found = _norm(source, width) or _attention(source, width) or _swiglu(source, width)
    if found is None or any(num_readers(graph, node) != 1 for node in (found.weight, found.bias) if node is not None):
        return None
    return found


def scalable(graph: GraphModule, linear: Node) -> Producer:
    """What makes the input of `linear`. Raises ValueError, naming it, when nothing does."""
    producer = producer_of(graph, linear)
    if producer is None:
        raise ValueError(f"the input of {site_of(linear)} cannot be scaled: no weight makes its channels linearly")
    return producer


def attention_before(linear: Node) -> Node:
    """The attention whose heads `linear` reads: linear(flatten(transpose(attention)), W)."""
    return node_of(node_of(node_of(linear.args[0]).args[0]).args[0])


def head_size(attention: Node) -> int:
    """C of attention(q, k, transpose(unflatten(v, -1, [J, C]))). Raises ValueError for values not split into heads."""
    split = node_of(node_of(attention.args[2]).args[0])
    if not is_call(split, aten.unflatten.int):
        raise ValueError(f"{attention.name} does not read values split into heads")
    sizes = split.args[2]
    assert isinstance(sizes, list | tuple), sizes
    return int_of(sizes[-1])


def query_key_rows(graph: GraphModule, linear: Node) -> Tensor:
    """Bool [N]: rows of a merged q, k, v linear that make queries and keys; no row of any other linear."""
    chosen = torch.zeros(attribute(graph, node_of(linear.args[1])).shape[0], dtype=torch.bool)
    for reader in calls(graph, aten.linear.default):
        producer = producer_of(graph, reader)
        if producer is not None and producer.through == "attention" and producer.weight is linear.args[1]:
            chosen[:] = True
            chosen[producer.rows] = False
    return chosen


def _norm(source: Node, width: int) -> Producer | None:
    if not is_call(source, aten.rms_norm.default) or len(source.args) < 3 or not is_attribute(source.args[2]):
        return None
    rows = torch.arange(width, device="cpu")
    return Producer(weight=node_of(source.args[2]), bias=None, rows=rows, through="norm")


def _attention(source: Node, width: int) -> Producer | None:
    chain = _walk(source, aten.flatten.using_ints, aten.transpose.int)
    if chain is None or not is_call(chain, aten.scaled_dot_product_attention.default) or len(chain.users) != 1:
        return None
    heads = node_of(chain.args[2])
    split = _walk(heads, aten.transpose.int)
    if split is None or not is_call(split, aten.unflatten.int) or len(split.users) != 1:
        return None
    part = node_of(split.args[0])
    if not is_call(part, aten.slice.Tensor) or part.args[1] != -1 or len(part.args) != 4 or len(part.users) != 1:
        return None
    size, first, end = head_size(chain), int_of(part.args[2]), int_of(part.args[3])
    channel = torch.arange(width, device="cpu")
    repeats = width // (end - first)  # query heads that read one value head, side by side
    rows = first + channel // size // repeats * size + channel % size
    return _made_by(node_of(part.args[0]), rows, "attention")


def _swiglu(source: Node, width: int) -> Producer | None:
    if not is_call(source, aten.mul.Tensor):
        return None
    active, up = source.args
    if not is_call(active, aten.silu.default) or not is_call(up, aten.slice.Tensor):
        return None
    up = node_of(up)
    if up.args[1:] != (-1, 1, END, 2) or len(up.users) != 1:
        return None
    return _made_by(node_of(up.args[0]), 2 * torch.arange(width, device="cpu") + 1, "swiglu")


def _walk(node: Node, *ops: object) -> Node | None:
    """The node before a chain of `ops`, last one first, each with one reader."""
    for op in ops:
        if not is_call(node, op) or len(node.users) != 1:
            return None
        node = node_of(node.args[0])
    return node


def _made_by(linear: Node, rows: Tensor, through: Literal["attention", "swiglu"]) -> Producer | None:
    if not is_call(linear, aten.linear.default) or not is_attribute(linear.args[1]):
        return None
    bias = node_of(linear.args[2]) if len(linear.args) > 2 and linear.args[2] is not None else None
    return Producer(weight=node_of(linear.args[1]), bias=bias, rows=rows, through=through)
