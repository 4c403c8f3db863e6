"""Store what stays in float as float16, cast where it is read; small vectors (norms, biases) stay float32.

linear(x, W)      ->  linear(x, to_float32(W16))
embedding(E, ids) ->  to_float32(embedding(E16, ids)), or codes[ids] * scale[ids] with 8 bits
"""

import torch
from torch.fx import GraphModule, Node

from passes.graph import add_attribute, attribute, attribute_name, calls, is_attribute, node_of
from passes.solvers.nearest import round_to_nearest

aten = torch.ops.aten


class HalfRangeError(ValueError):
    """A weight is too large for float16; the model, not the pass, is at fault."""


class StoreHalf:
    """Raises when a weight leaves float16's range, where a silent infinity would follow."""

    def __init__(self, *, embedding_bits: int = 16) -> None:
        self.embedding_bits = embedding_bits

    def __call__(self, graph: GraphModule) -> int:
        count = 0
        for linear in calls(graph, aten.linear.default):
            if is_attribute(linear.args[1]):
                with graph.graph.inserting_before(linear):
                    half = self._half(graph, node_of(linear.args[1]))
                    linear.update_arg(1, graph.graph.call_function(aten.to.dtype, (half, torch.float32)))
                count += 1
        for lookup in calls(graph, aten.embedding.default):
            self._store_embedding(graph, lookup)
            count += 1
        return count

    @staticmethod
    def _half(graph: GraphModule, source: Node) -> Node:
        weight = attribute(graph, source)
        half = weight.to(torch.float16)
        if not weight.is_meta and not bool(half.isfinite().all()):
            raise HalfRangeError(f"{attribute_name(source)} leaves the range of float16")
        return add_attribute(graph, f"{attribute_name(source).removesuffix('.weight')}.weight_half", half)

    def _store_embedding(self, graph: GraphModule, lookup: Node) -> None:
        table, ids = node_of(lookup.args[0]), lookup.args[1]
        with graph.graph.inserting_before(lookup):
            if self.embedding_bits == 8:
                name = attribute_name(table).removesuffix(".weight")
                grid = round_to_nearest(attribute(graph, table), bits=8, group=0)
                rows = graph.graph.call_function(
                    aten.embedding.default, (add_attribute(graph, f"{name}.codes", grid.codes), ids)
                )
                scales = graph.graph.call_function(
                    aten.embedding.default, (add_attribute(graph, f"{name}.w_scale", grid.scale), ids)
                )
                rows = graph.graph.call_function(aten.to.dtype, (rows, torch.float32))
                value = graph.graph.call_function(aten.mul.Tensor, (rows, scales))
            else:
                rows = graph.graph.call_function(aten.embedding.default, (self._half(graph, table), ids))
                value = graph.graph.call_function(aten.to.dtype, (rows, torch.float32))
        lookup.replace_all_uses_with(value)
        graph.graph.erase_node(lookup)
