"""Quantised operands of attention: keys after RoPE and values as a cache holds them, probabilities for studies.

    attention(q, k, v, visible)  ->  attention(q, stored(k), stored(v), visible)

    stored(x) = dequantize_rows(pack(codes), scale),  codes, scale = quantize(x)        packed at 4 bits alone
    z = P' V,  P = softmax(Q K^T / sqrt(C))                                             P' on a grid of its own

Shape letters: B batch, Q query rows, S slots, H query heads, J key/value heads, C channels a head.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node

from passes.graph import calls, node_of, outputs
from passes.quant_spec import QuantPlan
from plugins.int4 import codes_per_byte
from plugins.quantize import QUANTIZE

ProbScale = Literal["unit", "row"]
aten, ops = torch.ops.aten, torch.ops.dllmc


class QuantizeAttention:
    """Every attention, when the plan has one of its operands below 16 bits.

    Keys and values are rounded per token and head, on a grid as symmetric as that of the linears' activations
    (what the study does in either case). Probabilities are not for export: no ONNX operator rounds them.
    """

    def __init__(self, plan: QuantPlan) -> None:
        self.spec = plan.attention
        self.symmetric = plan.symmetric_rows

    def __call__(self, graph: GraphModule) -> int:
        count = 0
        if self.spec.is_float:
            return 0
        for node in calls(graph, aten.scaled_dot_product_attention.default):
            if len(node.args) > 4 or set(node.kwargs) - {"enable_gqa"}:
                raise ValueError(f"{node.name} has dropout, a causal mask or a scale of its own")
            with graph.graph.inserting_before(node):
                for place, bits in ((1, self.spec.k_bits), (2, self.spec.v_bits)):
                    if bits < 16:
                        node.update_arg(place, _stored(graph, node_of(node.args[place]), bits, self.symmetric))
            if self.spec.prob_bits < 16:
                self._round_probabilities(graph, node)
            count += 1
        return count

    def _round_probabilities(self, graph: GraphModule, node: Node) -> None:
        # Numbers, not the spec: a graph is turned into code, which knows no classes of ours.
        numbers = (self.spec.prob_bits, self.spec.prob_scale)
        with graph.graph.inserting_before(node):
            operands = (*node.args, *[None] * (4 - len(node.args)))
            new = graph.graph.call_function(quantized_attention, (*operands, *numbers))
        node.replace_all_uses_with(new)
        graph.graph.erase_node(node)


def _stored(graph: GraphModule, x: Node, bits: int, symmetric: bool) -> Node:
    """What is left of `x` [B, J, S, C] when it went through codes, at the insertion point."""
    arguments = QUANTIZE.arguments(x, bits=bits, symmetric=symmetric)
    quantized = graph.graph.call_function(ops.quantize.default, tuple(arguments.values()))
    codes, scale, *zero = outputs(graph, quantized, 2 if symmetric else 3)
    if codes_per_byte(bits) == 2:
        codes = graph.graph.call_function(ops.pack.default, (codes,))
    return graph.graph.call_function(ops.dequantize_rows.default, (codes, scale, zero[0] if zero else None, bits))


def quantized_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor | None,
    prob_bits: int = 16,
    prob_scale: ProbScale = "unit",
) -> Tensor:
    """[B, H, Q, C] of q [B, H, Q, C], k and v [B, J, S, C], visible bool [B, 1 or H, Q, S].

    Probabilities are not made to sum to one again, as nothing in hardware would.
    """
    if prob_bits >= 16:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=q.shape[1] != k.shape[1])
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    mixed: Tensor = round_probabilities(scores.softmax(-1), prob_bits, prob_scale) @ v
    return mixed


def round_probabilities(probabilities: Tensor, bits: int, scale: ProbScale) -> Tensor:
    """On the fixed grid 0, 1/(2^b - 1), .. 1 (unit), or per row on the asymmetric grid of activations (row)."""
    if scale == "row":
        rows: Tensor = ops.fake_quant(probabilities, bits, False)
        return rows
    steps = 2**bits - 1
    rounded: Tensor = (probabilities * steps).round() / steps
    return rounded
