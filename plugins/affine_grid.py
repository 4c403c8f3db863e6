"""The activation quantiser's grid: one scale, and for skewed rows one integer zero, per row or group.

    symmetric    s = amax / qmax                          q = clip(rint(x / s), -qmax, qmax)         x ~ s q
    asymmetric   s = (hi - lo) / (2 qmax)                 q = clip(rint(x / s) - z, -qmax, qmax)     x ~ s (q + z)
                 z = rint((hi + lo) / (2 s)),  hi = clip_hi * max(x, 0),  lo = clip_lo * min(x, 0)

rint is half to even, divisions are true divisions in float32, s = 1 where it would be 0.
"""

import onnx_ir as ir
import torch
from torch import Tensor

from plugins.body import INT32, Body
from plugins.int4 import code_limit
from plugins.op import Attributes, float32


def _divide(x: Tensor, divisor: float) -> Tensor:
    # Dividing by a Python number multiplies by its reciprocal on CUDA: one rounding more.
    return x / x.new_full((), divisor)


def _positive(scale: Tensor) -> Tensor:
    return torch.where(scale > 0, scale, scale.new_full((), 1.0))


def quantize_rows(
    x: Tensor, bits: int, symmetric: bool, clip_lo: float, clip_hi: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes float32 like x, scale [..., 1] and zero float32 [..., 1] (None when symmetric) over the last axis."""
    limit = code_limit(bits)
    if symmetric:
        scale = _positive(_divide(x.abs().amax(dim=-1, keepdim=True) * float32(clip_hi), limit))
        return torch.clamp(torch.round(x / scale), -limit, limit), scale, None
    high = x.amax(dim=-1, keepdim=True).clamp(min=0) * float32(clip_hi)
    low = x.amin(dim=-1, keepdim=True).clamp(max=0) * float32(clip_lo)
    scale = _positive(_divide(high - low, 2 * limit))
    zero = torch.round((high + low) / (scale * 2))
    return torch.clamp(torch.round(x / scale) - zero, -limit, limit), scale, zero


def split_groups(x: Tensor, a_group: int) -> Tensor:
    """View [..., K] as [..., G, g]; G = 1 when a_group is 0. Raises ValueError when the size does not divide K."""
    size = a_group or x.shape[-1]
    if x.shape[-1] % size:
        raise ValueError(f"a_group does not divide K; got {a_group} and K {x.shape[-1]}")
    return torch.unflatten(x, -1, (-1, size))


def write_grid(body: Body, x: ir.Value, attributes: Attributes) -> tuple[ir.Value, ir.Value, ir.Value | None]:
    """Nodes of `quantize_rows`: codes FLOAT, scale FLOAT, zero INT32 or None."""
    limit = code_limit(int(attributes["bits"]))
    last, nothing = body.ints(-1), body.scalar(0.0)
    high_ratio, low_ratio = body.scalar(attributes["clip_hi"]), body.scalar(attributes["clip_lo"])

    def round_clip(steps: ir.Value) -> ir.Value:
        return body("Clip", steps, body.scalar(float(-limit)), body.scalar(float(limit)))

    def positive(scale: ir.Value) -> ir.Value:
        return body("Where", body("Greater", scale, nothing), scale, body.scalar(1.0))

    if attributes["symmetric"]:
        amax = body("Mul", body("ReduceMax", body("Abs", x), last, keepdims=1), high_ratio)
        scale = positive(body("Div", amax, body.scalar(float(limit))))
        return round_clip(body("Round", body("Div", x, scale))), scale, None
    high = body("Mul", body("Max", body("ReduceMax", x, last, keepdims=1), nothing), high_ratio)
    low = body("Mul", body("Min", body("ReduceMin", x, last, keepdims=1), nothing), low_ratio)
    scale = positive(body("Div", body("Sub", high, low), body.scalar(float(2 * limit))))
    zero = body("Round", body("Div", body("Add", high, low), body("Mul", scale, body.scalar(2.0))))
    codes = round_clip(body("Sub", body("Round", body("Div", x, scale)), zero))
    return codes, scale, body.cast(zero, INT32)
