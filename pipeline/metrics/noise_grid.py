"""The canvases that models are told apart on: every answer at every level of noise, the same masks for each candidate.

Level l of n masks round(l / n * length) positions of an answer, one at least, drawn by (seed, sample, level) alone.
Shape letters: N canvases, L sequence, B batch, R head rows.
"""

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.backends.backend import Feeds
from pipeline.calibration.states import Sample, States
from pipeline.runner.settings import Settings
from pipeline.validation.feeds import scored_batches

Row = tuple[Sample, Sequence[int]]  # a sample and its masked positions


@dataclass(frozen=True, kw_only=True)
class NoiseGrid:
    """Canvas `sample * len(levels) + level` is sample `sample` at noise `levels[level]`."""

    states: States
    levels: tuple[float, ...]

    @property
    def tokens(self) -> int:
        """Masked positions of all canvases."""
        return int(self.states.masked.sum())

    @property
    def count(self) -> int:
        """Samples, each at every level."""
        return len(self.states.kv_len) // len(self.levels)


@dataclass(frozen=True, kw_only=True)
class MaskedRows:
    """One pass, and of its head rows the masked positions: `counts` [B, R], `targets` and `canvases` one for each."""

    feeds: Feeds
    counts: Tensor
    targets: Tensor
    canvases: Tensor


def noise_grid(
    samples: Iterable[Sample], settings: Settings, *, levels: int = 8, seed: int = 0, tokens: int | None = None
) -> NoiseGrid:
    """Canvases of the samples, of so many that `tokens` positions are masked; raises ValueError for too few or none."""
    rows: list[Row] = []
    drawn = 0
    for number, whole in enumerate(samples):
        sample = whole.cut(settings.max_length)
        end = len(sample.ids)
        for level in range(1, levels + 1):
            count = max(1, round(level / levels * (end - sample.start)))
            draw = random.Random(f"{seed}/{number}/{level}")
            rows.append((sample, draw.sample(range(sample.start, end), count)))
            drawn += count
        if tokens is not None and drawn >= tokens:
            break
    if not rows or (tokens is not None and drawn < tokens):
        raise ValueError(f"the samples give {drawn} masked tokens; expected {tokens or 1} or more")
    return NoiseGrid(states=canvases(rows, settings), levels=tuple(level / levels for level in range(1, levels + 1)))


def canvases(rows: Sequence[Row], settings: Settings) -> States:
    """Canvases with exactly these positions masked; `noise` is the masked share of the answer."""
    longest = max(len(sample.ids) for sample, _ in rows)
    clean = torch.full((len(rows), longest), settings.pad_id)
    answer = torch.zeros(len(rows), longest, dtype=torch.bool)
    masked = torch.zeros_like(answer)
    for n, (sample, positions) in enumerate(rows):
        size = len(sample.ids)
        clean[n, :size] = torch.tensor(sample.ids)
        answer[n, sample.start : size] = True
        masked[n, torch.tensor(positions)] = True
    return States(
        input_ids=clean.masked_fill(masked, settings.mask_id),
        clean_ids=clean,
        kv_len=torch.tensor([len(sample.ids) for sample, _ in rows]),
        answer=answer,
        noise=masked.sum(1) / answer.sum(1),
        masked=masked,
    )


def masked_rows(states: States, settings: Settings, size: int) -> Iterator[MaskedRows]:
    """Passes over the canvases in order, `size` at a time."""
    first = 0
    for batch in scored_batches(settings, states, size):
        counts = torch.from_numpy(batch.counts)
        numbers = torch.arange(first, first + len(counts))[:, None].expand_as(counts)
        targets = torch.from_numpy(batch.targets)[counts]
        yield MaskedRows(feeds=batch.feeds, counts=counts, targets=targets, canvases=numbers[counts])
        first += len(counts)
