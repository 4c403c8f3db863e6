"""Round to nearest: the scale is the largest magnitude over the largest code, or the range over the number of steps."""

import torch
from torch import Tensor

from passes.solvers.grid import Grid, Levels, row_chunks


def round_to_nearest(
    weight: Tensor, *, bits: int, group: int, symmetric: bool = True, clip: Tensor | None = None
) -> Grid:
    """Grid of weight [N, K]; one group is the whole row when `group` is 0; `clip` [N, G] are ratios of the range.

    Ties go to even; a row (or group) of zeros gets scale 1.
    """
    levels, (rows, inner) = Levels(bits, symmetric), weight.shape
    size = group or inner
    codes = torch.empty(rows, inner, dtype=torch.int8, device=weight.device)
    scale = torch.empty(rows, inner // size, dtype=torch.float32, device=weight.device)
    zero = torch.empty_like(scale, dtype=torch.int8)
    for chunk in row_chunks(weight):
        part = torch.unflatten(weight[chunk].float(), 1, (-1, size))
        found, offset = levels.fit(part, 1.0 if clip is None else clip[chunk])
        codes[chunk] = levels.round(part, found[..., None], offset[..., None]).flatten(1).to(torch.int8)
        scale[chunk], zero[chunk] = found, offset.to(torch.int8)
    return Grid(codes=codes, scale=scale, zero=None if symmetric else zero)
