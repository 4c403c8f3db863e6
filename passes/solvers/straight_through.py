"""Quantisers that gradients pass through: values as the real ones give them, rounding with the derivative one.

Straight-through estimator of arXiv 1308.3432. Scales are functions of what is quantised and of the clip ratios, and
have their gradients, too; where a code is clamped only the scale has one.
Shape letters: N outputs, K inner, G groups, g one group.
"""

from typing import Any

import torch
from torch import Tensor

from plugins.affine_grid import split_groups
from plugins.int4 import code_limit


def round_through(x: Tensor) -> Tensor:
    """Half to even; the derivative is one."""
    # The difference is zero exactly, so the value is that of the rounding to the bit.
    return x.detach().round() + (x - x.detach())


def fake_quant_through(
    x: Tensor, *, bits: int, symmetric: bool, a_group: int, clip_lo: Tensor, clip_hi: Tensor
) -> Tensor:
    """What `fake_quant` makes of x [..., K], with gradients of x and of the two clip ratios."""
    limit = code_limit(bits)
    rows = split_groups(x, a_group)
    if symmetric:
        return symmetric_through(rows, clip_hi, limit).flatten(-2)
    high = rows.amax(dim=-1, keepdim=True).clamp(min=0) * clip_hi
    low = rows.amin(dim=-1, keepdim=True).clamp(max=0) * clip_lo
    scale = _positive((high - low) / (2 * limit))
    zero = round_through((high + low) / (scale * 2))
    codes = (round_through(rows / scale) - zero).clamp(-limit, limit)
    return ((codes + zero) * scale).flatten(-2)


def quantize_weight_through(weight: Tensor, *, bits: int, w_group: int, clip: Tensor) -> Tensor:
    """`weight` [N, K] on its symmetric grid, the largest code at `clip` [N, G] of the largest magnitude."""
    return symmetric_through(split_groups(weight, w_group), clip[..., None], code_limit(bits)).flatten(-2)


def symmetric_through(rows: Tensor, clip: Tensor, limit: int) -> Tensor:
    """s q of rows [..., g]: s = clip amax / limit, q = clip(rint(x / s), +-limit); `clip` broadcasts with [..., 1]."""
    value: Tensor = _Symmetric.apply(rows, clip, limit)  # type: ignore[no-untyped-call]
    return value


class _Symmetric(torch.autograd.Function):
    """By hand, since it runs over every weight in every step: half the time, and two tensors kept instead of ten."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, clip: Tensor, limit: int) -> Tensor:
        largest, place = rows.abs().max(dim=-1, keepdim=True)
        scale = _positive(largest * clip / limit)
        ctx.save_for_backward(rows, clip, scale, place)
        ctx.limit = limit
        return (rows / scale).round_().clamp_(-limit, limit).mul_(scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, clip, scale, place = ctx.saved_tensors
        steps = rows / scale
        outside = steps.round()
        codes = outside.clamp(-ctx.limit, ctx.limit)
        # A one or a zero by arithmetic: comparisons, and products with booleans, take several times as long.
        inside = outside.sub_(codes).abs_().clamp_(max=1).neg_().add_(1)
        by_rows = inside.mul_(gradient)
        by_scale = codes.mul_(gradient).sub_(steps.mul_(by_rows)).sum(dim=-1, keepdim=True) / ctx.limit
        peak = rows.gather(-1, place)
        by_rows.scatter_add_(-1, place, by_scale * clip * peak.sign())
        return by_rows, (by_scale * peak.abs()).sum_to_size(clip.shape), None


def _positive(scale: Tensor) -> Tensor:
    return torch.where(scale > 0, scale, 1.0)
