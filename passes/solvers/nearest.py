"""Round to nearest: the scale is the largest magnitude over the largest code."""

import torch
from torch import Tensor


def round_to_nearest(weight: Tensor, *, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """Symmetric codes int8 [N, K] and scales float32 [N, G] of weight [N, K]; G is 1 when `group` is 0.

    Ties go to even; a row (or group) of zeros gets scale 1.
    """
    top = float(2 ** (bits - 1) - 1)
    rows, inner = weight.shape
    grouped = weight.float().reshape(rows, -1, group or inner)
    scale = grouped.abs().amax(dim=-1, keepdim=True) / top
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    codes = (grouped / scale).round().clamp(-top, top).to(torch.int8)
    return codes.reshape(rows, inner), scale.squeeze(-1)
