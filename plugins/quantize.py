"""Everything between a float activation and its integer codes, as one op: the seam in front of every linear.

    prepare          RMSNorm, channel scale, TAC, transform, state gate: `prepare`
    quantise         `affine_grid`

Shape letters: M rows, K inner, G groups, a x b = K the Kronecker factors, g channels a TAC block.
"""

from collections.abc import Mapping

import onnx_ir as ir
import torch
from torch import Tensor

from plugins.affine_grid import quantize_rows, split_groups, write_grid
from plugins.body import INT4, INT8, Body
from plugins.op import Attributes, Op
from plugins.prepare import prepare, write_prepare


def quantize(
    x: Tensor,
    norm_weight: Tensor | None = None,
    channel_scale: Tensor | None = None,
    tac_matrix: Tensor | None = None,
    tac_bias: Tensor | None = None,
    left: Tensor | None = None,
    right: Tensor | None = None,
    state: Tensor | None = None,
    bits: int = 4,
    symmetric: bool = True,
    a_group: int = 0,
    clip_lo: float = 1.0,
    clip_hi: float = 1.0,
    eps: float = 1e-5,
    gate_axis: int = 0,
    gate_size: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes int8 [..., K], scale float32 [..., 1] or [..., G], zero int32 like scale ([0] when symmetric).

    norm_weight, channel_scale, tac_bias [K]; tac_matrix [K/g, g, g]; left [a, a]; right [b, b]; state int32, one a row.
    Raises ValueError for sizes that do not fit or a state without a transform.
    """
    x = prepare(x, norm_weight, channel_scale, tac_matrix, tac_bias, left, right, state, eps, gate_axis, gate_size)
    codes, scale, zero = quantize_rows(split_groups(x, a_group), bits, symmetric, clip_lo, clip_hi)
    none = torch.empty(0, dtype=torch.int32, device=x.device)
    return (
        codes.flatten(-2).to(torch.int8),
        scale.squeeze(-1),
        none if zero is None else zero.squeeze(-1).to(torch.int32),
    )


def write_quantize(body: Body, v: Mapping[str, ir.Value], attributes: Attributes) -> list[ir.Value]:
    """Nodes of `quantize`."""
    x = write_prepare(body, v, attributes)
    shape, group = body("Shape", v["x"]), int(attributes["a_group"])
    if group:
        x = body("Reshape", x, body.join(body.lead(v["x"]), body.ints(-1, group)))
    elif "tac_matrix" in v or "left" in v:
        x = body("Reshape", x, shape)
    codes, scale, zero = write_grid(body, x, attributes)
    if group:
        # INT4 has no Reshape kernel, so the float codes are reshaped.
        codes = body("Reshape", codes, shape)
        scale = body("Squeeze", scale, body.ints(-1))
        zero = None if zero is None else body("Squeeze", zero, body.ints(-1))
    codes = body.cast(codes, INT4 if attributes["bits"] <= 4 else INT8)
    return [codes, scale] if zero is None else [codes, scale, zero]


QUANTIZE = Op(
    name="quantize",
    reference=quantize,
    onnx_type="DllmcQuantize",
    body=write_quantize,
    outputs=lambda attributes: ("codes", "scale") if attributes["symmetric"] else ("codes", "scale", "zero"),
    narrow=lambda attributes: ("codes",) if attributes["bits"] <= 4 else (),
    flags={
        "has_norm": ("norm_weight",),
        "has_scale": ("channel_scale",),
        "has_tac": ("tac_matrix", "tac_bias"),
        "has_transform": ("left", "right"),
        "has_state": ("state",),
    },
)
