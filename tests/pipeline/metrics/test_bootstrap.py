"""Intervals against a plain loop and the normal approximation; equal models differ by nothing."""

import math
import statistics

import numpy as np
import pytest

from pipeline.metrics.bootstrap import Interval, non_inferior, paired
from pipeline.metrics.sums import Sums


def sums_of(values, weights=None):
    return Sums(values=tuple(map(float, values)), weights=tuple(map(float, weights or [1] * len(values))))


def test_interval_is_that_of_resampled_means():
    draw = np.random.default_rng(3)
    weights = draw.integers(1, 9, 23).tolist()
    reference, candidate = (sums_of(draw.normal(size=23), weights) for _ in range(2))
    interval = paired(reference, candidate, seed=5, resamples=200, confidence=0.9)
    again = np.random.default_rng(5)
    differences = []
    for _ in range(200):
        picks = again.integers(23, size=23).tolist()
        total = sum(weights[i] for i in picks)
        differences.append(sum(candidate.values[i] - reference.values[i] for i in picks) / total)
    low, high = np.quantile(differences, [0.05, 0.95])
    assert (interval.low, interval.high) == (pytest.approx(low, abs=1e-12), pytest.approx(high, abs=1e-12))
    assert interval.difference == pytest.approx(candidate.mean - reference.mean)
    assert interval.count == 23


def test_interval_is_near_the_normal_one_and_narrower_than_unpaired():
    draw = np.random.default_rng(0)
    hardness = draw.normal(size=400) * 5
    gain = draw.normal(size=400) + 0.3
    interval = paired(sums_of(hardness), sums_of(hardness + gain))
    half = 1.96 * statistics.stdev(gain) / math.sqrt(400)
    assert interval.low == pytest.approx(np.mean(gain) - half, abs=0.1 * half)
    assert interval.high == pytest.approx(np.mean(gain) + half, abs=0.1 * half)


def test_equal_models_differ_by_nothing():
    sums = sums_of([3, 1, 4], [1, 2, 5])
    assert paired(sums, sums) == Interval(difference=0.0, low=0.0, high=0.0, count=3)
    assert paired(sums_of([1, 9]), sums_of([2, 5]), seed=1) == paired(sums_of([1, 9]), sums_of([2, 5]), seed=1)


def test_samples_without_weight_say_nothing():
    reference, candidate = sums_of([1, 0, 2], [1, 0, 1]), sums_of([2, 0, 3], [1, 0, 1])
    interval = paired(reference, candidate)
    assert (interval.low, interval.high, interval.count) == (1.0, 1.0, 2)


def test_other_samples_do_not_pair():
    with pytest.raises(ValueError, match="2 samples do not pair with 3"):
        paired(sums_of([1, 2]), sums_of([1, 2, 3]))
    with pytest.raises(ValueError, match="weight in one of the two only"):
        paired(sums_of([1, 2], [1, 0]), sums_of([1, 2]))


@pytest.mark.parametrize(
    ("low", "high", "higher", "lower"),
    [
        (-0.005, 0.02, True, False),
        (-0.02, 0.005, False, True),
        (-0.01, 0.01, True, True),
        (-0.02, 0.02, False, False),
        (math.nan, math.nan, False, False),
    ],
)
def test_non_inferior_looks_at_the_bad_side(low, high, higher, lower):
    interval = Interval(difference=0.0, low=low, high=high, count=9)
    assert non_inferior(interval, 0.01, higher_is_better=True) is higher
    assert non_inferior(interval, 0.01, higher_is_better=False) is lower
