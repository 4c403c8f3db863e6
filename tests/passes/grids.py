"""Grids of weights, slowly: one number at a time, in numpy."""

import numpy as np
from torch import Tensor

from passes.solvers.grid import Grid


def textbook_levels(bits: int, symmetric: bool) -> tuple[int, int]:
    """Smallest and largest code."""
    top = 2 ** (bits - 1) - 1
    return (-top, top) if symmetric else (-top - 1, top)


def textbook_scale(part: np.ndarray, bits: int, symmetric: bool, clip: float = 1.0) -> tuple[np.float32, int]:
    """Scale and zero of one group."""
    low, high = textbook_levels(bits, symmetric)
    kind, ratio = part.dtype.type, part.dtype.type(clip)
    if symmetric:
        scale = np.float32(kind(max(abs(value) for value in part)) * ratio / kind(high))
        return (scale if scale > 0 else np.float32(1)), 0
    largest, smallest = max(kind(0), *part) * ratio, min(kind(0), *part) * ratio
    scale = np.float32((largest - smallest) / kind(high - low))
    scale = scale if scale > 0 else np.float32(1)
    return scale, min(max(round(float(kind(low) - smallest / scale)), low), high)  # round() is half to even


def textbook_code(value: np.floating, scale: np.float32, zero: int, bits: int, symmetric: bool) -> int:
    """Code of one number."""
    low, high = textbook_levels(bits, symmetric)
    return min(max(round(float(value / scale)) + zero, low), high)


def textbook_nearest(
    weight: np.ndarray, bits: int, group: int, symmetric: bool, clip: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes [N, K], scales and zeros [N, G]."""
    size = group or weight.shape[1]
    codes = np.zeros(weight.shape, np.int8)
    scales = np.zeros((weight.shape[0], weight.shape[1] // size), np.float32)
    zeros = np.zeros(scales.shape, np.int8)
    for row in range(weight.shape[0]):
        for g in range(scales.shape[1]):
            part = weight[row, g * size : (g + 1) * size]
            scale, zero = textbook_scale(part, bits, symmetric, 1.0 if clip is None else clip[row, g])
            scales[row, g], zeros[row, g] = scale, zero
            for column, value in enumerate(part, start=g * size):
                codes[row, column] = textbook_code(value, scale, zero, bits, symmetric)
    return codes, scales, zeros


def values(grid: Grid) -> Tensor:
    """What a grid stands for, float64 [N, K]."""
    size = grid.codes.shape[1] // grid.scale.shape[1]
    codes = grid.codes.double()
    if grid.zero is not None:
        codes = codes - grid.zero.double().repeat_interleave(size, dim=1)
    return codes * grid.scale.double().repeat_interleave(size, dim=1)
