"""Rows that are hard to quantise, and how far a kernel's codes may stand from the reference's."""

from typing import Any

import torch
from torch import Tensor

from plugins.affine_grid import split_groups
from plugins.int4 import code_limit, pack_codes, unpack_codes
from plugins.quantize import quantize

# float32: one operation is off by at most half of this.
EPSILON = 2.0**-23


def hard_rows(inner: int, seed: int = 0) -> Tensor:
    """Five rows with outliers, then the odd ones: zeros, one sign, ties, tiny values."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(5, inner, generator=random)
    x *= torch.where(torch.rand(5, inner, generator=random) < 0.02, 50.0, 1.0)
    steps = torch.arange(inner) % 15 - 7.0
    odd = [torch.zeros(inner), -torch.rand(inner, generator=random) - 1, torch.rand(inner, generator=random) + 1]
    odd += [steps, steps / 2, torch.arange(inner) % 29 / 2 - 4.0, steps * 1e-6]
    return torch.cat([x, torch.stack(odd)])


def assert_equal(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], bits: int) -> None:
    assert torch.equal(found[0], pack_codes(expected[0], bits))
    assert torch.equal(found[1], expected[1])
    assert torch.equal(found[2], expected[2])


def assert_near(found: tuple[Tensor, ...], y: Tensor, error: Tensor, options: dict[str, Any]) -> float:
    """`found` quantises values that differ from y, the reference's, by at most `error` (float64, like y).

    Scale: it moves by the largest error of its group over the limit of the codes, and by 3 roundings of its own.
    Steps x / s: off by the error, by the scale's, and by 3 roundings of a number that is clipped above 2 limit + 1.
    Codes may differ by 1, and only where the reference's x / s is that near to a half. Returns their share.
    So may a zero point, (high + low) / 2 s rounded: then its group moves with it, but for codes that are clipped.
    """
    bits, limit = options.get("bits", 4), code_limit(options.get("bits", 4))
    a_group = options.get("a_group", 0)
    codes, scale, zero = quantize(y, **options)
    wide = scale.double().unsqueeze(-1)
    values, errors = split_groups(y.double(), a_group), split_groups(error, a_group)
    worst = errors.amax(-1, keepdim=True) / wide
    moved = worst / limit + 3 * EPSILON
    assert ((found[1] - scale).abs().double().unsqueeze(-1) <= wide * moved).all()
    steps = (values / wide).clamp(-2 * limit - 1, 2 * limit + 1)
    near_half = _is_near_half(steps, errors / wide + steps.abs() * moved + (2 * limit + 1) * 3 * EPSILON)
    found_codes, codes = (split_groups(c.int(), a_group) for c in (unpack_codes(found[0], bits), codes))
    shift = torch.zeros_like(wide, dtype=torch.int32)
    if zero.numel():
        high = values.amax(-1, keepdim=True).clamp(min=0) * options.get("clip_hi", 1.0)
        low = values.amin(-1, keepdim=True).clamp(max=0) * options.get("clip_lo", 1.0)
        shift = (found[2] - zero).unsqueeze(-1)
        assert (shift.abs() <= _is_near_half((high + low) / (2 * wide), worst + limit * moved + 8 * EPSILON)).all()
    clipped = (shift != 0) & ((found_codes.abs() == limit) | (codes.abs() == limit))
    difference = (found_codes + shift - codes).abs()
    assert (difference <= (near_half | clipped)).all()
    return float((difference > 0).double().mean())


def _is_near_half(x: Tensor, tolerance: Tensor) -> Tensor:
    return (x - x.floor() - 0.5).abs() <= tolerance
