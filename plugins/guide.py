"""Classifier-free guidance: away from what the model would write without the prompt (arXiv 2207.12598, eq. 6).

    l = l_u + (w + 1) (l_c - l_u) = l_c + w (l_c - l_u)

in the second form, which is l_c to the last bit where w = 0. Rows come in pairs, the one with the prompt (c) first and
the one without it (u) behind, so that the pairs of neighbouring requests are neighbours, too.
Shape letters: B pairs, R head rows, V vocabulary.
"""

from collections.abc import Mapping

import onnx_ir as ir
import torch
from torch import Tensor

from plugins.body import INT64, Body
from plugins.op import Attributes, Op

OUTPUTS = ("guided", "first")


def guide(logits: Tensor, inv_temp: Tensor, guidance: Tensor) -> tuple[Tensor, Tensor]:
    """guided [B, R, V] from logits [2B, R, V] and w guidance [B], and the inverse temperatures [B] of inv_temp [2B]."""
    with_prompt, without = torch.unflatten(logits.float(), 0, (-1, 2)).unbind(1)
    guided = with_prompt + guidance[:, None, None] * (with_prompt - without)
    return guided, inv_temp[::2].clone()


def write_guide(body: Body, v: Mapping[str, ir.Value], attributes: Attributes) -> list[ir.Value]:
    """Nodes of `guide`."""
    rest = body("Shape", v["logits"], start=1)
    pairs = body("Reshape", v["logits"], body.join(body.ints(-1, 2), rest))
    with_prompt, without = (body("Gather", pairs, body.scalar(place, INT64), axis=1) for place in (0, 1))
    strength = body("Unsqueeze", v["guidance"], body.ints(1, 2))
    guided = body("Add", with_prompt, body("Mul", strength, body("Sub", with_prompt, without)))
    temperatures = body("Reshape", v["inv_temp"], body.ints(-1, 2))
    return [guided, body("Gather", temperatures, body.scalar(0, INT64), axis=1)]


GUIDE = Op(
    name="guide",
    reference=guide,
    onnx_type="DllmcGuide",
    body=write_guide,
    outputs=lambda attributes: OUTPUTS,
    inlined=True,
)
