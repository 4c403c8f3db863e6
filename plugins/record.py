"""What the denoising loop needs to know of a row of logits, so that the vocabulary never leaves the graph.

    l = logits + logit_bias,  m = max l (lowest id wins a tie),  z = l - m
    tail = sum of e^z over all but the argmax, so the confidence is 1 / (1 + tail)
    neg_entropy = sum p ln p = (sum e^z z) / (1 + tail) - ln(1 + tail)
    lse_t = logsumexp(l * inv_temp)

Reductions over the vocabulary run in float64 and are rounded to float32 once.
Shape letters: B batch, R head rows, V vocabulary, K top_k.
"""

from collections.abc import Mapping

import onnx_ir as ir
import torch
from torch import Tensor

from plugins.body import DOUBLE, FLOAT, INT64, Body
from plugins.op import Attributes, Op

OUTPUTS = ("top_ids", "top_logits", "tail", "neg_entropy", "lse_t")

# e^-1000 is 0 in float64 as well, and 0 * -1000 is 0 where 0 * -inf (a banned id) is not a number.
_NEGLIGIBLE = -1000.0


def record(
    logits: Tensor, logit_bias: Tensor, inv_temp: Tensor, top_k: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """top_ids int64 and top_logits [B, R, K], tail, neg_entropy, lse_t [B, R].

    logits [B, R, V]; logit_bias [V], -inf bans an id; inv_temp [B], above 0.
    """
    biased = logits.float() + logit_bias
    # topk breaks ties at will; a stable sort keeps the lower id first.
    ordered, ids = torch.sort(biased, dim=-1, descending=True, stable=True)
    peak = ordered[..., :1]
    z = (biased - peak).double().clamp(min=_NEGLIGIBLE)
    others = torch.arange(biased.shape[-1], device=ids.device) != ids[..., :1]
    weight = torch.where(others, z.exp(), z.new_zeros(()))
    tail = weight.sum(dim=-1)
    neg_entropy = (weight * z).sum(dim=-1) / (1 + tail) - torch.log(1 + tail)
    warm = inv_temp.double()[:, None, None]
    spread = ((biased.double() - peak.double()) * warm).exp().sum(dim=-1)
    lse_t = (peak.double() * warm).squeeze(-1) + spread.log()
    return ids[..., :top_k].clone(), ordered[..., :top_k].clone(), tail.float(), neg_entropy.float(), lse_t.float()


def write_record(body: Body, v: Mapping[str, ir.Value], attributes: Attributes) -> list[ir.Value]:
    """Nodes of `record`."""
    biased = body("Add", v["logits"], v["logit_bias"])
    top_logits, top_ids = body.multi("TopK", biased, body.ints(int(attributes["top_k"])), num_outputs=2, axis=-1)
    last, one = body.ints(-1), body.scalar(1.0, DOUBLE)
    peak = body("ReduceMax", biased, last, keepdims=1)
    z = body("Max", body.cast(body("Sub", biased, peak), DOUBLE), body.scalar(_NEGLIGIBLE, DOUBLE))
    size = body("Squeeze", body.size(v["logit_bias"], 0))
    vocabulary = body("Range", body.scalar(0, INT64), size, body.scalar(1, INT64))
    is_peak = body("Equal", vocabulary, body("ArgMax", biased, axis=-1, keepdims=1))
    weight = body("Where", is_peak, body.scalar(0.0, DOUBLE), body("Exp", z))
    tail = body("ReduceSum", weight, last, keepdims=0)
    total = body("Add", tail, one)
    energy = body("ReduceSum", body("Mul", weight, z), last, keepdims=0)
    neg_entropy = body("Sub", body("Div", energy, total), body("Log", total))
    warm = body("Unsqueeze", body.cast(v["inv_temp"], DOUBLE), body.ints(1, 2))
    wide_peak = body.cast(peak, DOUBLE)
    warmed = body("Mul", body("Sub", body.cast(biased, DOUBLE), wide_peak), warm)
    spread = body("ReduceSum", body("Exp", warmed), last, keepdims=0)
    lse_t = body("Add", body("Squeeze", body("Mul", wide_peak, warm), last), body("Log", spread))
    return [top_ids, top_logits, *(body.cast(value, FLOAT) for value in (tail, neg_entropy, lse_t))]


RECORD = Op(
    name="record",
    reference=record,
    onnx_type="DllmcRecord",
    body=write_record,
    outputs=lambda attributes: OUTPUTS,
    inlined=True,
)
