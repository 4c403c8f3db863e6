"""Intervals against a plain loop and the normal approximation; equal models differ by nothing."""

import math
import statistics

import numpy as np
import pytest

from pipeline.metrics.bootstrap import Interval, alone, joined, non_inferior, paired
from pipeline.metrics.sums import Sums


def sums_of(values, weights=None):
    return Sums(values=tuple(map(float, values)), weights=tuple(map(float, weights or [1] * len(values))))


def test_interval_is_that_of_resampled_means():
    draw = np.random.default_rng(3)
    weights = draw.integers(1, 9, 23).tolist()
    reference, candidate = (sums_of(draw.normal(size=23), weights) for _ in range(2))
    interval = paired([reference], [candidate], seed=5, resamples=200, confidence=0.9)
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
    interval = paired([sums_of(hardness)], [sums_of(hardness + gain)])
    half = 1.96 * statistics.stdev(gain) / math.sqrt(400)
    assert interval.low == pytest.approx(np.mean(gain) - half, abs=0.1 * half)
    assert interval.high == pytest.approx(np.mean(gain) + half, abs=0.1 * half)


def test_equal_models_differ_by_nothing():
    sums = sums_of([3, 1, 4], [1, 2, 5])
    assert paired([sums], [sums]) == Interval(difference=0.0, low=0.0, high=0.0, count=3)
    assert paired([sums], [sums] * 3) == Interval(difference=0.0, low=0.0, high=0.0, count=3)
    first, second = ([sums_of([1, 9])], [sums_of([2, 5]), sums_of([3, 3])])
    assert paired(first, second, seed=1) == paired(first, second, seed=1)


def test_samples_without_weight_say_nothing():
    reference, candidate = sums_of([1, 0, 2], [1, 0, 1]), sums_of([2, 0, 3], [1, 0, 1])
    interval = paired([reference], [candidate])
    assert (interval.low, interval.high, interval.count) == (1.0, 1.0, 2)


def test_other_samples_do_not_pair():
    with pytest.raises(ValueError, match="2 samples do not pair with 3"):
        paired([sums_of([1, 2])], [sums_of([1, 2, 3])])
    with pytest.raises(ValueError, match=r"seeds of \[2, 3\] samples"):
        paired([sums_of([1, 2])], [sums_of([1, 2]), sums_of([1, 2, 3])])
    with pytest.raises(ValueError, match="weight in one of the two only"):
        paired([sums_of([1, 2], [1, 0])], [sums_of([1, 2])])


def shifted(count, shifts, noise=0.01):
    """One `Sums` a seed: the same samples, all moved by what the seed does."""
    draw = np.random.default_rng(7)
    return [sums_of(shift + draw.normal(size=count) * noise) for shift in shifts]


def test_seeds_that_spread_more_than_samples_widen_the_interval():
    """Of samples alone nothing would be in doubt beyond 0.05 bits."""
    a, b = shifted(400, [0.1, 0.3, 0.05]), shifted(400, [0.2, 0.12, 0.22])
    of_samples = paired([joined(a)], [joined(b)])
    assert of_samples.high < 0.05
    assert of_samples.low > -0.05
    interval = paired(a, b)
    assert interval.difference == pytest.approx(joined(b).mean - joined(a).mean)
    assert interval.low < -0.1
    assert interval.high > 0.1


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_resamples_of_seeds_have_the_variance_of_a_mean(seeds, monkeypatch):
    """s^2 / S with S - 1 in the denominator of s; drawing S of S seeds would give (S - 1) / S of it."""
    shifts = np.random.default_rng(2).normal(size=seeds)
    kept = []
    monkeypatch.setattr(np, "quantile", lambda values, tails: (kept.append(values), np.array([0.0, 0.0]))[1])
    alone(shifted(3, shifts, noise=0.0), resamples=20000)
    assert kept[0].var() == pytest.approx(statistics.variance(shifts) / seeds, rel=0.05)


def test_one_figure_has_an_interval_of_its_own():
    draw = np.random.default_rng(4)
    values = draw.normal(size=300) + 2
    interval = alone([sums_of(values, [2] * 300)])
    half = 1.96 * statistics.stdev(values) / math.sqrt(300) / 2
    assert interval.difference == pytest.approx(values.mean() / 2)
    assert (interval.low, interval.high) == (
        pytest.approx(values.mean() / 2 - half, abs=0.1 * half),
        pytest.approx(values.mean() / 2 + half, abs=0.1 * half),
    )
    assert alone([sums_of([3, 0, 3], [1, 0, 1])]).count == 2


def test_seeds_are_joined_sample_by_sample():
    first, second = sums_of([1, 4], [1, 2]), sums_of([3, 0], [1, 2])
    assert joined([first, second]) == sums_of([2, 2], [1, 2])
    assert joined([first]) == first


@pytest.mark.parametrize("count", [300, 500, 1000])
@pytest.mark.parametrize("seeds", [1, 3])
def test_a_point_is_a_point_whatever_the_rounding(count, seeds):
    """An interval that ends at one point exactly, where a difference of two shares is a rounding beyond."""
    right = round(0.988 * count)
    full = sums_of([n < right for n in range(count)])

    def lost(number):
        return [sums_of([n < right - number for n in range(count)])] * seeds

    found = [paired([full], lost(number)) for number in range(6)]
    assert any(each.low == -0.01 for each in found)
    for each in found:
        # percentiles are multiples of 1/count, but between two of them
        assert non_inferior(each, 0.01, higher_is_better=True) is (round(each.low * count, 6) >= -0.01 * count)


def test_two_lost_of_five_hundred_are_within_a_point_and_three_are_not():
    full, two, three = (sums_of([n < right for n in range(500)]) for right in (494, 492, 491))
    interval = paired([full], [two])
    assert interval.low == pytest.approx(-0.01)
    assert non_inferior(interval, 0.01, higher_is_better=True)
    assert not non_inferior(paired([full], [three]), 0.01, higher_is_better=True)


def test_the_border_may_be_a_rounding_away():
    beyond = 0.978 - 0.988
    assert beyond < -0.01
    assert non_inferior(Interval(difference=0, low=beyond, high=0, count=500), 0.01, higher_is_better=True)
    assert non_inferior(Interval(difference=0, low=0, high=-beyond, count=500), 0.01, higher_is_better=False)
    assert not non_inferior(Interval(difference=0, low=-0.01001, high=0, count=500), 0.01, higher_is_better=True)


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
