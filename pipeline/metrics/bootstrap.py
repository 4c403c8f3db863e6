"""Paired bootstrap: how sure is the difference of two models on the same samples?

Samples are drawn with replacement, whole and in both models alike, so what makes one harder than another cancels;
the interval is that of the percentiles (Efron and Tibshirani, An Introduction to the Bootstrap, ch. 13). Where a model
has several seeds these are drawn, too, for each model by itself: S - 1 of S, with replacement, because the mean of S
drawn ones would vary by (S - 1) / S of what it should (Rao and Wu, JASA 83, 1988, with m = n - 1).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.metrics.sums import Sums

CHUNK = 64  # resamples held at once
# A mean of n values is exact to n roundings, and a change of one sample in n moves it by 1/n: up to a million samples
# this is above the first (n 2^-53) and far below the second.
ROUNDING = 1e-9

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Interval:
    """Candidate's mean minus the reference's, and the bounds that hold it with the confidence asked for."""

    difference: float
    low: float
    high: float
    count: int


def joined(seeds: Sequence[Sums]) -> Sums:
    """The mean of several seeds, sample by sample."""
    if len(seeds) == 1:
        return seeds[0]
    values, weights = (np.mean([getattr(each, name) for each in seeds], 0).tolist() for name in ("values", "weights"))
    return Sums(values=tuple(values), weights=tuple(weights))


def paired(
    reference: Sequence[Sums],
    candidate: Sequence[Sums],
    *,
    seed: int = 0,
    resamples: int = 2000,
    confidence: float = 0.95,
) -> Interval:
    """Interval of the difference of the means over all seeds; samples without weight in both are left out.

    Raises ValueError when the two are not of the same samples.
    """
    tables = [_table(reference), _table(candidate)]
    counts = [table.shape[-1] for table in tables]
    if counts[0] != counts[1]:
        raise ValueError(f"{counts[0]} samples do not pair with {counts[1]}")
    weighs = np.concatenate([table[:, 1] for table in tables]) > 0
    kept = weighs.any(0)
    if not weighs[:, kept].all():
        raise ValueError("a sample has weight in one of the two only; they are not of the same samples")
    differences = _differences([table[..., kept] for table in tables], seed, resamples)
    return _interval(joined(candidate).mean - joined(reference).mean, differences, int(kept.sum()), confidence)


def alone(seeds: Sequence[Sums], *, seed: int = 0, resamples: int = 2000, confidence: float = 0.95) -> Interval:
    """Interval of the mean itself, which is its difference from 0."""
    table = _table(seeds)
    kept = (table[:, 1] > 0).any(0)
    nothing = np.stack([np.zeros(table.shape[-1]), np.ones(table.shape[-1])])[None]
    differences = _differences([nothing[..., kept], table[..., kept]], seed, resamples)
    return _interval(joined(seeds).mean, differences, int(kept.sum()), confidence)


def non_inferior(interval: Interval, margin: float, *, higher_is_better: bool) -> bool:
    """Whether the interval excludes that the candidate is worse by more than `margin`; a NaN never does.

    A bound that is the margin but for rounding is not beyond it: 489/500 - 494/500 is a little more than -0.01 away.
    """
    limit = margin + ROUNDING
    return interval.low >= -limit if higher_is_better else interval.high <= limit


def _table(seeds: Sequence[Sums]) -> Floats:
    """[seeds, 2 (values, weights), samples]"""
    if len({each.count for each in seeds}) != 1:
        raise ValueError(f"seeds of {[each.count for each in seeds]} samples are not of the same samples")
    return np.array([(each.values, each.weights) for each in seeds])


def _differences(tables: Sequence[Floats], seed: int, resamples: int) -> Floats:
    """Second mean minus the first of every resample [resamples]."""
    samples, draws = np.random.default_rng(seed), np.random.default_rng([seed, 1])
    count = tables[0].shape[-1]
    found = []
    for start in range(0, resamples, CHUNK):
        picks = samples.integers(count, size=(min(CHUNK, resamples - start), count))
        expected, reached = (_sums(table, picks, draws) for table in tables)
        same = (expected[1] == reached[1]).all()  # then one division: equal changes give equal numbers
        if same:
            found.append((reached[0] - expected[0]) / reached[1])
        else:
            found.append(reached[0] / reached[1] - expected[0] / expected[1])
    return np.concatenate(found)


def _sums(table: Floats, picks: npt.NDArray[np.int64], draws: np.random.Generator) -> Floats:
    """Values and weights [2, resamples] of the samples picked, as a mean over the seeds drawn."""
    seeds = len(table)
    sums: Floats = table[:, :, picks].sum(-1)
    if seeds == 1:
        only: Floats = sums[0]
        return only
    drawn = draws.integers(seeds, size=(len(picks), seeds - 1))
    chosen: Any = sums[drawn, :, np.arange(len(picks))[:, None]]  # [resamples, seeds - 1, 2]
    mean: Floats = chosen.mean(1).T
    return mean


def _interval(difference: float, differences: Floats, count: int, confidence: float) -> Interval:
    tail = (1.0 - confidence) / 2
    low, high = np.quantile(differences, [tail, 1.0 - tail]).tolist()
    return Interval(difference=difference, low=low, high=high, count=count)
