"""Simulated integer linears become real ones.

    linear(fake_quant(x, a), dequantize(codes, s, w), bias) -> int<w>_linear(quantize(x, a), codes, s, bias)

Linears with float activations keep their DequantizeLinear + MatMul form (W4A16, W3A16).
"""

import torch
from torch.fx import GraphModule, Node

from passes.graph import add_attribute, attribute, calls, int_of, is_call, node_of, outputs, site_of

aten, ops = torch.ops.aten, torch.ops.dllmc


class LowerLinears:
    """One `quantize` serves every linear that read one `fake_quant`."""

    def __call__(self, graph: GraphModule) -> int:
        quantized: dict[Node, list[Node]] = {}
        count = 0
        for linear in calls(graph, aten.linear.default):
            if not is_call(linear.args[0], ops.fake_quant.default):
                continue
            source = node_of(linear.args[0])
            if source not in quantized:
                quantized[source] = self._quantize(graph, source)
            self._lower(graph, linear, source, quantized[source])
            count += 1
        return count

    @staticmethod
    def _quantize(graph: GraphModule, source: Node) -> list[Node]:
        x, bits, symmetric, a_group, clip_lo, clip_hi = source.args
        with graph.graph.inserting_before(source):
            call = graph.graph.call_function(
                ops.quantize.default,
                (x, *[None] * 7, bits, symmetric, a_group, clip_lo, clip_hi, 0.0, 0, 0),
            )
            return outputs(graph, call, 2 if symmetric else 3)

    @staticmethod
    def _lower(graph: GraphModule, linear: Node, source: Node, quantized: list[Node]) -> None:
        weight = node_of(linear.args[1])
        codes, scale, w_bits, w_group = weight.args
        _, a_bits, symmetric, a_group, _, _ = source.args
        bias = linear.args[2] if len(linear.args) > 2 else None
        op = ops.int4_linear.default if w_bits == 4 else ops.int8_linear.default
        zero = w_sum = None
        with graph.graph.inserting_before(linear):
            if not symmetric:
                zero = quantized[2]
                table = attribute(graph, node_of(codes))
                size = int_of(a_group) or int_of(w_group) or table.shape[1]
                grouped = table.reshape(table.shape[0], -1, size)
                w_sum = add_attribute(graph, f"{site_of(linear)}.w_sum", grouped.sum(-1, dtype=torch.int32))
            arguments = (*quantized[:2], zero, codes, scale, w_sum, bias, None)
            lowered = graph.graph.call_function(op, (*arguments, a_bits, w_bits, a_group, w_group, False, 0))
        linear.replace_all_uses_with(lowered)
        graph.graph.erase_node(linear)
