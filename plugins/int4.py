"""The number formats: ranges of signed codes, and two 4-bit codes per byte with the even element in the low nibble.

Codes are symmetric (-7..7 for 4 bits, -127..127 for 8), so a negated tensor has negated codes and u8 x s8 products
of 4-bit codes cannot saturate. Weights with a zero point, which meet float activations only, have one code more (-8,
-128). The bytes equal ONNX `INT4` data: two's complement nibbles, low nibble first.
"""

import torch
from torch import Tensor


def code_limit(bits: int) -> int:
    """Largest code of a signed symmetric format: 7 for 4 bits, 127 for 8. Raises ValueError outside 2..8 bits."""
    if not 2 <= bits <= 8:
        raise ValueError(f"unsupported number of bits; got {bits}, expected 2 to 8")
    return (1 << (bits - 1)) - 1


def code_range(bits: int, symmetric: bool) -> tuple[int, int]:
    """Smallest and largest code of a weight: with a zero point one more. Raises ValueError outside 2..8 bits."""
    limit = code_limit(bits)
    return (-limit if symmetric else -limit - 1), limit


def codes_per_byte(bits: int) -> int:
    """How many codes of a format share a byte in memory."""
    return 2 if bits <= 4 else 1


def pack_int4(codes: Tensor) -> Tensor:
    """Pack int8 codes -8..7 [..., K] into uint8 [..., K/2]. Raises ValueError for odd K or codes out of range."""
    if codes.shape[-1] % 2:
        raise ValueError(f"two codes share a byte; got a last dimension of {codes.shape[-1]}, expected an even one")
    if codes.numel() and (int(codes.min()) < -8 or int(codes.max()) > 7):
        raise ValueError(f"codes do not fit 4 bits; got {int(codes.min())}..{int(codes.max())}, expected -8..7")
    return join_nibbles(codes)


def join_nibbles(codes: Tensor) -> Tensor:
    """`pack_int4` of codes that are known to fit: the values are not looked at, so shapes alone will do."""
    nibbles = codes.to(torch.int16) & 0xF
    return (nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)).to(torch.uint8)


def unpack_int4(packed: Tensor) -> Tensor:
    """Inverse of `pack_int4`: uint8 [..., K/2] to int8 codes [..., K]."""
    wide = packed.to(torch.int16)
    nibbles = torch.stack((wide & 0xF, wide >> 4), dim=-1).flatten(-2)
    return torch.where(nibbles > 7, nibbles - 16, nibbles).to(torch.int8)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Int8 codes [..., K] as kernels hold them: int8 [..., K / codes_per_byte(bits)]."""
    return pack_int4(codes).view(torch.int8) if codes_per_byte(bits) == 2 else codes


def unpack_codes(stored: Tensor, bits: int) -> Tensor:
    """Inverse of `pack_codes`."""
    return unpack_int4(stored.view(torch.uint8)) if codes_per_byte(bits) == 2 else stored
