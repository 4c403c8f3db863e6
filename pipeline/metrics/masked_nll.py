"""Masked NLL: how many bits a model needs for each masked token of a noise grid, from its whole distribution.

    bits = - sum over masked positions of log2 p(token | canvas),  mean = bits / masked positions

What cannot be generated (the mask, rows beyond the vocabulary) has p = 0, as in the denoising loop.
Shape letters: N canvases, M masked positions of a pass, V vocabulary rows.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from pipeline.calibration.states import States
from pipeline.metrics.noise_grid import MaskedRows, NoiseGrid, masked_rows
from pipeline.metrics.probe import Observation, Probe
from pipeline.metrics.sums import Sums
from pipeline.runner.settings import Settings

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class MaskedNll:
    """Bits and masked tokens of each sample over all levels, and at each level of the grid."""

    bits: Sums
    by_level: tuple[Sums, ...]


def masked_nll(probe: Probe, grid: NoiseGrid, settings: Settings, *, size: int = 32) -> MaskedNll:
    """Bits per masked token, `size` canvases a pass."""
    return nll_of(canvas_bits(probe, grid.states, settings, size=size), grid)


def canvas_bits(probe: Probe, states: States, settings: Settings, *, size: int) -> Floats:
    """Bits of all masked tokens of each canvas [N]."""
    found = np.zeros(len(states.kv_len))
    for rows in masked_rows(states, settings, size):
        found += by_canvas(rows, token_bits(log_probabilities(probe.observe(rows.feeds), rows), rows), len(found))
    return found


def log_probabilities(observation: Observation, rows: MaskedRows) -> Tensor:
    """ln p [M, V] in float64 at the masked positions."""
    return observation.logits[rows.counts].double().log_softmax(-1)


def token_bits(log_p: Tensor, rows: MaskedRows) -> Tensor:
    """-log2 p of each target [M]."""
    return -log_p.gather(1, rows.targets[:, None]).squeeze(1) / math.log(2)


def by_canvas(rows: MaskedRows, values: Tensor, count: int) -> Floats:
    """Sums of `values` [M] by canvas [`count`]."""
    summed: npt.NDArray[Any] = np.bincount(rows.canvases.numpy(), weights=values.numpy(), minlength=count)
    return summed.astype(np.float64)


def nll_of(bits: Floats, grid: NoiseGrid) -> MaskedNll:
    """The metric from the bits of each canvas of the grid."""
    return MaskedNll(
        bits=by_sample(bits, grid),
        by_level=tuple(
            Sums(values=tuple(values), weights=tuple(weights))
            for values, weights in zip(split(bits, grid).T.tolist(), split(tokens(grid), grid).T.tolist(), strict=True)
        ),
    )


def by_sample(values: Floats, grid: NoiseGrid) -> Sums:
    """Values of the canvases and their masked tokens, summed over the levels."""
    return Sums(
        values=tuple(split(values, grid).sum(1).tolist()), weights=tuple(split(tokens(grid), grid).sum(1).tolist())
    )


def split(values: Floats, grid: NoiseGrid) -> Floats:
    """[canvases] -> [samples, levels]."""
    return values.reshape(grid.count, len(grid.levels))


def tokens(grid: NoiseGrid) -> Floats:
    """Masked positions of each canvas [N]."""
    return grid.states.masked.sum(1).numpy().astype(np.float64)
