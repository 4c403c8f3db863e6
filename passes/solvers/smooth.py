"""Scales that move the range of activations into the weights. K input channels."""

import torch
from torch import Tensor

SMALLEST = 1e-5


def smoothing_scale(x_amax: Tensor, w_amax: Tensor, alpha: float) -> Tensor:
    """s = max|X|^alpha / max|W|^(1 - alpha), float32 [K] of two [K] (SmoothQuant, arXiv 2211.10438, equation 4).

    A channel that calibration never saw, or that no weight reads, keeps scale 1: the formula has nothing to go by.
    """
    x, w = x_amax.double(), w_amax.double()
    scale = (x**alpha / w.clamp(min=SMALLEST) ** (1 - alpha)).clamp(min=SMALLEST)
    return torch.where((x > 0) & (w > 0), scale, torch.ones_like(scale)).float()
