"""The values that rows of codes stand for, `quantize` undone: how a cache is read; standard nodes in the file.

    x = s (q + z)        on the grid of `affine_grid`

Shape letter: K channels.
"""

from collections.abc import Mapping

import onnx_ir as ir
from torch import Tensor

from plugins.body import FLOAT, INT8, Body
from plugins.int4 import codes_per_byte, unpack_codes
from plugins.op import Attributes, Op


def dequantize_rows(codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int = 8) -> Tensor:
    """x float32 [..., K] from codes int8 [..., K], two a byte [..., K/2] at 4 bits; scale, zero int32 [..., 1]."""
    steps = unpack_codes(codes, bits).float()
    return (steps if zero is None else steps + zero) * scale


def write_dequantize_rows(body: Body, v: Mapping[str, ir.Value], attributes: Attributes) -> list[ir.Value]:
    """Nodes of `dequantize_rows`."""
    codes = v["codes"] if codes_per_byte(int(attributes["bits"])) == 1 else _write_unpacked(body, v["codes"])
    steps = body.cast(codes, FLOAT)
    if attributes["has_zero"]:
        steps = body("Add", steps, body.cast(v["zero"], FLOAT))
    return [body("Mul", steps, v["scale"])]


def _write_unpacked(body: Body, packed: ir.Value) -> ir.Value:
    """Nodes of `unpack_codes`: INT8 [..., K]; nothing leaves -128..127."""
    eight = body.scalar(8, INT8)
    low = body("BitwiseXor", body("BitwiseAnd", packed, body.scalar(15, INT8)), eight)
    even = body("Sub", low, eight)
    # A multiple of 16: Div, which truncates, is exact.
    odd = body("Div", body("BitwiseAnd", packed, body.scalar(-16, INT8)), body.scalar(16, INT8))
    # ONNX Runtime broadcasts over pairs, or gathers from a table, several times slower than it concatenates.
    pairs = body("Concat", *(body("Unsqueeze", half, body.ints(-1)) for half in (even, odd)), axis=-1)
    channels = body("Mul", body.size(packed, -1), body.ints(2))
    return body("Reshape", pairs, body.join(body.lead(packed), channels))


DEQUANTIZE_ROWS = Op(
    name="dequantize_rows",
    reference=dequantize_rows,
    onnx_type="DllmcDequantizeRows",
    body=write_dequantize_rows,
    flags={"has_zero": ("zero",)},
    inlined=True,
)
