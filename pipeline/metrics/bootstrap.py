"""Paired bootstrap: how sure is the difference of two models on the same samples?

Samples are drawn with replacement, whole and in both models alike, so what makes one harder than another cancels;
the interval is that of the percentiles (Efron and Tibshirani, An Introduction to the Bootstrap, ch. 13).
"""

from dataclasses import dataclass

import numpy as np

from pipeline.metrics.sums import Sums

CHUNK = 64  # resamples held at once


@dataclass(frozen=True, kw_only=True)
class Interval:
    """Candidate's mean minus the reference's, and the bounds that hold it with the confidence asked for."""

    difference: float
    low: float
    high: float
    count: int


def paired(
    reference: Sums, candidate: Sums, *, seed: int = 0, resamples: int = 2000, confidence: float = 0.95
) -> Interval:
    """Interval of the difference of the means; samples without weight in both are left out.

    Raises ValueError when the two are not of the same samples.
    """
    if reference.count != candidate.count:
        raise ValueError(f"{reference.count} samples do not pair with {candidate.count}")
    table = np.array([candidate.values, candidate.weights, reference.values, reference.weights])
    table = table[:, (table[1] > 0) | (table[3] > 0)]
    if not (table[[1, 3]] > 0).all():
        raise ValueError("a sample has weight in one of the two only; they are not of the same samples")
    count = table.shape[1]
    draw = np.random.default_rng(seed)
    differences = []
    for start in range(0, resamples, CHUNK):
        picks = draw.integers(count, size=(min(CHUNK, resamples - start), count))
        found, weight, expected, other_weight = table[:, picks].sum(-1)
        differences.append(found / weight - expected / other_weight)
    tail = (1.0 - confidence) / 2
    low, high = np.quantile(np.concatenate(differences), [tail, 1.0 - tail]).tolist()
    return Interval(difference=candidate.mean - reference.mean, low=low, high=high, count=count)


def non_inferior(interval: Interval, margin: float, *, higher_is_better: bool) -> bool:
    """Whether the interval excludes that the candidate is worse by more than `margin`; a NaN never does."""
    return interval.low >= -margin if higher_is_better else interval.high <= margin
