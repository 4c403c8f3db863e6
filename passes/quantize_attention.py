"""Simulate quantised operands of attention, for studies in torch: keys after RoPE, values, probabilities.

    z = P' V',  P = softmax(Q K'^T / sqrt(C))       K', V', P' on grids of their own

Shape letters: B batch, Q query rows, S slots, H query heads, J key/value heads, C channels a head.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node

from passes.graph import calls
from passes.quant_spec import QuantPlan

ProbScale = Literal["unit", "row"]
aten = torch.ops.aten


class QuantizeAttention:
    """Every attention, when the plan has one of its operands below 16 bits.

    Keys and values are rounded per token and head, on a grid as symmetric as that of the linears' activations
    (what the study does in either case). Not for export: no ONNX operator computes this.
    """

    def __init__(self, plan: QuantPlan) -> None:
        self.spec = plan.attention
        self.symmetric = plan.linear is None or plan.linear.symmetric

    def __call__(self, graph: GraphModule) -> int:
        count = 0
        if self.spec.is_float:
            return 0
        for node in calls(graph, aten.scaled_dot_product_attention.default):
            self._replace(graph, node)
            count += 1
        return count

    def _replace(self, graph: GraphModule, node: Node) -> None:
        if len(node.args) > 4 or set(node.kwargs) - {"enable_gqa"}:
            raise ValueError(f"{node.name} has dropout, a causal mask or a scale of its own")
        spec = self.spec
        # Numbers, not the spec: a graph is turned into code, which knows no classes of ours.
        numbers = (spec.k_bits, spec.v_bits, spec.prob_bits, spec.prob_scale, self.symmetric)
        with graph.graph.inserting_before(node):
            operands = (*node.args, *[None] * (4 - len(node.args)))
            new = graph.graph.call_function(quantized_attention, (*operands, *numbers))
        node.replace_all_uses_with(new)
        graph.graph.erase_node(node)


def quantized_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor | None,
    k_bits: int = 16,
    v_bits: int = 16,
    prob_bits: int = 16,
    prob_scale: ProbScale = "unit",
    symmetric: bool = True,
) -> Tensor:
    """[B, H, Q, C] of q [B, H, Q, C], k and v [B, J, S, C], visible bool [B, 1 or H, Q, S].

    Probabilities are not made to sum to one again, as nothing in hardware would.
    """
    k, v = _round(k, k_bits, symmetric), _round(v, v_bits, symmetric)
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
        return _round(probabilities, bits, symmetric=False)
    steps = 2**bits - 1
    rounded: Tensor = (probabilities * steps).round() / steps
    return rounded


def _round(x: Tensor, bits: int, symmetric: bool) -> Tensor:
    """Each row on its own grid; 16 bits are left alone."""
    if bits >= 16:
        return x
    rounded: Tensor = torch.ops.dllmc.fake_quant(x, bits, symmetric)
    return rounded
