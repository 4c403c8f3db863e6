"""Weight codes back to float, for layers whose activations stay float: standard DequantizeLinear in ONNX.

Shape letters: N outputs, K inner, G groups.
"""

from collections.abc import Mapping

import onnx_ir as ir
import torch
from torch import Tensor

from plugins.body import Body
from plugins.int4 import code_limit
from plugins.op import Attributes, Op


def dequantize(codes: Tensor, w_scale: Tensor, bits: int, w_group: int = 0, w_zero: Tensor | None = None) -> Tensor:
    """Weight float32 [N, K] = (codes int8 [N, K] - w_zero int8) * w_scale, both of which are [N, 1] or [N, G].

    Raises ValueError for sizes that differ.
    """
    code_limit(bits)
    size = w_group or codes.shape[-1]
    if size * w_scale.shape[-1] != codes.shape[-1]:
        raise ValueError(f"scales do not fit; got {w_scale.shape[-1]} of {size} columns, expected {codes.shape[-1]}")
    if w_zero is not None and w_zero.shape != w_scale.shape:
        raise ValueError(f"zeros do not fit; got {tuple(w_zero.shape)}, expected {tuple(w_scale.shape)}")
    grouped = torch.unflatten(codes.float(), -1, (-1, size))
    if w_zero is not None:
        grouped = grouped - w_zero[..., None]
    return (grouped * w_scale[..., None]).flatten(-2)


def write_dequantize(body: Body, v: Mapping[str, ir.Value], attributes: Attributes) -> list[ir.Value]:
    """Nodes of `dequantize`."""
    codes, w_scale, size = v["codes"], v["w_scale"], attributes["w_group"]
    if attributes["has_zero"]:
        # ONNX Runtime squeezes no INT4, so a whole row is one block here.
        assert codes.shape is not None
        return [body("DequantizeLinear", codes, w_scale, v["w_zero"], axis=1, block_size=size or codes.shape[1])]
    if size:
        return [body("DequantizeLinear", codes, w_scale, axis=1, block_size=size)]
    return [body("DequantizeLinear", codes, body("Squeeze", w_scale, body.ints(1)), axis=0)]


DEQUANTIZE = Op(
    name="dequantize",
    reference=dequantize,
    onnx_type="DllmcDequantize",
    body=write_dequantize,
    narrow=lambda attributes: ("codes", "w_zero") if attributes["bits"] <= 4 else (),
    flags={"has_zero": ("w_zero",)},
    inlined=True,
)
