"""Search of the clip ratio that rounds a weight with the least error, apart for each row or group."""

import torch
from torch import Tensor

from passes.solvers.grid import Levels, row_chunks


def clip_ratios(
    weight: Tensor,
    *,
    bits: int,
    group: int,
    symmetric: bool,
    steps: int = 100,
    lowest: float = 0.2,
    power: float = 2.4,
) -> Tensor:
    """Ratios float32 [N, G] among 1, 1 - 1/steps, ... above `lowest`, with the least sum of |error|^power.

    Source: QuaRot, arXiv 2404.00456, weight quantisation (its defaults), after GPTQ's search.
    """
    levels, (rows, inner) = Levels(bits, symmetric), weight.shape
    size = group or inner
    ratios = torch.ones(rows, inner // size, device=weight.device)
    for chunk in row_chunks(weight):
        part = torch.unflatten(weight[chunk].float(), 1, (-1, size))
        ends, least = levels.range_of(part), torch.full_like(ratios[chunk], torch.inf)
        for step in range(steps):
            ratio = 1 - step / steps
            if ratio <= lowest:
                break
            scale, zero = (each[..., None] for each in levels.fit_range(*ends, ratio))
            wrong = levels.value(levels.round(part, scale, zero), scale, zero) - part
            error = wrong.abs_().pow_(power).sum(dim=-1)
            ratios[chunk] = torch.where(error < least, ratio, ratios[chunk])
            least = torch.minimum(error, least)
    return ratios
