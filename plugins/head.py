"""The LM head on integer codes, with the record of each row taken in the same op: logits stay inside.

Shape letters: B batch, R head rows, V vocabulary, K inner.
"""

from collections.abc import Mapping

import onnx_ir as ir
from torch import Tensor

from plugins.body import FLOAT, Body
from plugins.integer_matmul import integer_matmul, write_matmul
from plugins.layout import from_layout, write_canonical
from plugins.op import Attributes, Op
from plugins.record import OUTPUTS, record, write_record


def head(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    w_scale: Tensor,
    logit_bias: Tensor,
    inv_temp: Tensor,
    top_k: int,
    layout: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The five outputs of `record` for logits = scale * (w_scale * float(codes weight^T)).

    codes int8 [B, R, K] of at most 8 bits; scale [B, R, 1]; weight int8 [V, K] in `layout`; w_scale [V, 1].
    """
    acc = integer_matmul(codes, from_layout(weight, layout), a_bits=8, w_bits=8)
    logits = acc.float() * w_scale.squeeze(-1) * scale
    return record(logits, logit_bias, inv_temp, top_k)


def write_head(body: Body, v: Mapping[str, ir.Value], attributes: Attributes) -> list[ir.Value]:
    """Nodes of `head`."""
    weight = write_canonical(body, v["weight"], int(attributes["layout"]))
    acc = write_matmul(body, v["codes"], weight, a_bits=8, w_bits=8)
    logits = body("Mul", body.cast(acc, FLOAT), body("Squeeze", v["w_scale"], body.ints(1)))
    return write_record(body, {**v, "logits": body("Mul", logits, v["scale"])}, attributes)


HEAD = Op(
    name="head",
    reference=head,
    onnx_type="DllmcHead",
    body=write_head,
    outputs=lambda attributes: OUTPUTS,
)
