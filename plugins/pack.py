"""Two 4-bit codes a byte, as caches hold them; standard nodes in the file.

    byte = 16 odd + (even mod 16)        int8, the nibbles of ONNX `INT4` data

Shape letter: K channels.
"""

from collections.abc import Mapping

import onnx_ir as ir
import torch
from torch import Tensor

from plugins.body import INT8, Body
from plugins.int4 import join_nibbles
from plugins.op import Attributes, Op

LARGEST = 2**63 - 1


def pack(codes: Tensor) -> Tensor:
    """Bytes int8 [..., K/2] of codes int8 [..., K], each -8..7 and K even."""
    return join_nibbles(codes).view(torch.int8)


def write_pack(body: Body, v: Mapping[str, ir.Value], attributes: Attributes) -> list[ir.Value]:
    """Nodes of `pack`; no product or sum leaves -128..127."""
    codes = body.cast(v["codes"], INT8)
    even, odd = (
        body("Slice", codes, body.ints(first), body.ints(LARGEST), body.ints(-1), body.ints(2)) for first in (0, 1)
    )
    high = body("Mul", odd, body.scalar(16, INT8))
    return [body("Add", high, body("BitwiseAnd", even, body.scalar(15, INT8)))]


PACK = Op(
    name="pack",
    reference=pack,
    onnx_type="DllmcPack",
    body=write_pack,
    narrow=lambda attributes: ("codes",),
    inlined=True,
)
