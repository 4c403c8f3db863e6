"""Activation-aware scales and clips, by search on the error of the linear's output (AWQ, arXiv 2306.00978).

Two deviations from the released code. It clamps weights at +-r max|w| and fits the grid anew, here both ends of the
grid are scaled by r. It scores the scales of q_k_v and gate_up by the output of the whole attention or MLP, here by the
linear's own, as equation 4 does.

Shape letters: M sample rows, N outputs, K input channels, G groups.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from passes.solvers.grid import row_chunks

# Weight [n, K] and clip ratios [n, G] (None: all 1) -> the values that its codes stand for; row by row.
Requantize = Callable[[Tensor, Tensor | None], Tensor]

SMALLEST = 1e-4


@dataclass(frozen=True, kw_only=True)
class Searched:
    """Scale float32 [K], and the squared error of the outputs with it and with none; never above the latter."""

    scale: Tensor
    error: float
    plain_error: float


def search_scale(
    weight: Tensor, rows: Tensor, magnitude: Tensor, requantize: Requantize, *, steps: int = 20
) -> Searched:
    """s = m^r / sqrt(max m^r min m^r) of `magnitude` m [K], with the r of 0, 1/steps, .. below 1 that is best:

    least |Q(W diag(s)) diag(1/s) X^T - W X^T|^2 of weight [N, K] on rows [M, K] (equations 4 and 5; the mean
    magnitude and the normalisation are the released code's). r = 0 is rounding to nearest.
    """
    rows = same_gram(rows)
    best: Searched | None = None
    for step in range(steps):
        powers = (magnitude.double() ** (step / steps)).clamp(min=SMALLEST)
        scale = (powers / (powers.max() * powers.min()).sqrt()).float()
        error = math.fsum(_error(weight[chunk], scale, rows, requantize) for chunk in row_chunks(weight))
        if best is None or error < best.error:
            best = Searched(scale=scale, error=error, plain_error=error if best is None else best.plain_error)
    assert best is not None
    assert best.error <= best.plain_error, "the search begins at rounding to nearest"
    return best


def search_clip(
    weight: Tensor, rows: Tensor, requantize: Requantize, *, group: int, steps: int = 20, lowest: float = 0.5
) -> Tensor:
    """Clip ratios float32 [N, G] of 1, 1 - 1/steps, .. not below `lowest`, each the best of its row and group:

    least |(Q(W) - W) X^T|^2 over the columns of the group, rows [M, K] (the released code's search, of
    the ratios of both ends of the grid).
    """
    size = group or weight.shape[1]
    samples = same_gram(rows.reshape(len(rows), -1, size).transpose(0, 1))
    ratios = [ratio for step in range(steps) if (ratio := 1 - step / steps) >= lowest]
    return torch.cat([_clip(weight[chunk], samples, requantize, ratios) for chunk in row_chunks(weight)])


def same_gram(rows: Tensor) -> Tensor:
    """At most K rows [.., K, K] with the products X^T X of rows [.., M, K]: squared errors of outputs are the same."""
    if rows.shape[-2] <= rows.shape[-1]:
        return rows
    triangle: Tensor = torch.linalg.qr(rows, mode="r").R
    return triangle


def _error(weight: Tensor, scale: Tensor, rows: Tensor, requantize: Requantize) -> float:
    change = requantize(weight * scale, None) / scale - weight
    return float((rows @ change.T).square().sum(dtype=torch.float64))


def _clip(weight: Tensor, samples: Tensor, requantize: Requantize, ratios: list[float]) -> Tensor:
    groups, _, size = samples.shape
    best = torch.full((len(weight), groups), torch.inf)
    chosen = torch.ones_like(best)
    for ratio in ratios:
        change = requantize(weight, torch.full_like(chosen, ratio)) - weight
        # [G, n, K/G] x [G, K/G, M]: the share of every group in the outputs
        moved = change.reshape(-1, groups, size).transpose(0, 1) @ samples.transpose(1, 2)
        error = moved.square().sum(-1).T
        chosen[error < best] = ratio
        best = torch.minimum(best, error)
    return chosen
