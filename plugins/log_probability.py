"""How likely given ids are at each row of logits: what scores a text, where the loop asks for the best ids (`record`).

    l = logits + logit_bias,  target_logp = ln softmax(l * inv_temp)[target]

The whole rows l come out, too: a runtime computes an output only where it is asked for.
Reductions over the vocabulary run in float64 and are rounded to float32 once.
Shape letters: B batch, R head rows, V vocabulary.
"""

from collections.abc import Mapping

import onnx_ir as ir
from torch import Tensor

from plugins.body import DOUBLE, FLOAT, Body
from plugins.op import Attributes, Op

OUTPUTS = ("target_logp", "biased")


def log_probability(logits: Tensor, logit_bias: Tensor, inv_temp: Tensor, target_ids: Tensor) -> tuple[Tensor, Tensor]:
    """target_logp [B, R] and biased [B, R, V], float32.

    logits [B, R, V]; logit_bias [V], -inf bans an id; inv_temp [B], above 0; target_ids int64 [B, R].
    """
    biased = logits.float() + logit_bias
    warmed = biased.double() * inv_temp.double()[:, None, None]
    peak = warmed.amax(dim=-1, keepdim=True)
    total = (warmed - peak).exp().sum(dim=-1).log()
    behind = (warmed.gather(-1, target_ids[..., None]) - peak).squeeze(-1)
    return (behind - total).float(), biased


def write_log_probability(body: Body, v: Mapping[str, ir.Value], attributes: Attributes) -> list[ir.Value]:
    """Nodes of `log_probability`."""
    last = body.ints(-1)
    biased = body("Add", v["logits"], v["logit_bias"])
    warm = body("Unsqueeze", body.cast(v["inv_temp"], DOUBLE), body.ints(1, 2))
    warmed = body("Mul", body.cast(biased, DOUBLE), warm)
    peak = body("ReduceMax", warmed, last, keepdims=1)
    total = body("Log", body("ReduceSum", body("Exp", body("Sub", warmed, peak)), last, keepdims=0))
    target = body("GatherElements", warmed, body("Unsqueeze", v["target_ids"], last), axis=2)
    behind = body("Squeeze", body("Sub", target, peak), last)
    return [body.cast(body("Sub", behind, total), FLOAT), biased]


LOG_PROBABILITY = Op(
    name="log_probability",
    reference=log_probability,
    onnx_type="DllmcLogProbability",
    body=write_log_probability,
    outputs=lambda attributes: OUTPUTS,
    inlined=True,
)
