"""Exact products of integer codes, in torch (which has no fast int32 GEMM on CPU) and in standard ONNX ops.

Shape letters: M rows, N outputs, K inner.
"""

import onnx_ir as ir
import torch
from torch import Tensor

from plugins.body import INT8, INT16, UINT8, Body
from plugins.int4 import code_limit

# A float64 copy of a whole LM head would be 8 bytes for each of its 5e8 weights.
_ROWS_AT_ONCE = 8192


def integer_matmul(codes: Tensor, weight: Tensor, a_bits: int, w_bits: int) -> Tensor:
    """Exact int32 codes [..., K] @ weight [N, K]^T -> [..., N]."""
    # Every partial sum is an integer of at most `bound`; below 2^24 (2^53) float32 (float64) holds each one
    # exactly, so neither the order of the sum nor fused multiply-adds can change the result.
    bound = codes.shape[-1] * code_limit(a_bits) * code_limit(w_bits)
    dtype = torch.float32 if bound < 2**24 else torch.float64
    wide = codes.to(dtype)
    parts = [wide @ rows.to(dtype).transpose(-1, -2) for rows in torch.split(weight, _ROWS_AT_ONCE)]
    return torch.cat(parts, dim=-1).to(torch.int32)


def _unsigned(body: Body, codes: ir.Value, offset: int) -> ir.Value:
    # INT4 casts to INT16 but has no Add; INT16 holds the sum at half the memory of INT32.
    return body.cast(body("Add", body.cast(codes, INT16), body.scalar(offset, INT16)), UINT8)


def write_operands(
    body: Body, codes: ir.Value, weight: ir.Value, a_bits: int, w_bits: int
) -> tuple[ir.Value, ir.Value, list[ir.Value]]:
    """Operands for MatMulInteger, weight still [N, K], and their zero points.

    Activations become unsigned because ORT has no fast s8 x s8. Its u8 x s8 kernels add pairs of products in 16 bits
    on processors without VNNI: 4-bit codes on one side cannot saturate (2 * 255 * 7 < 2^15), 8-bit codes on both
    sides can, hence u8 x u8 there, which ORT widens first.
    """
    narrow = min(a_bits, w_bits) <= 4
    offset = 8 if a_bits <= 4 else 128
    left = _unsigned(body, codes, offset)
    if narrow:
        return left, body.cast(weight, INT8), [body.scalar(offset, UINT8)]
    return left, _unsigned(body, weight, 128), [body.scalar(offset, UINT8), body.scalar(128, UINT8)]


def write_matmul(body: Body, codes: ir.Value, weight: ir.Value, a_bits: int, w_bits: int) -> ir.Value:
    """Nodes of `integer_matmul`: int32 [..., N]."""
    left, right, zeros = write_operands(body, codes, weight, a_bits, w_bits)
    return body("MatMulInteger", left, body("Transpose", right, perm=[1, 0]), *zeros)
