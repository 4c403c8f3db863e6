"""Sums have a weighted mean, survive JSON, and refuse what has none."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.metrics.bootstrap import Interval
from pipeline.metrics.free_run import FreeRun
from pipeline.metrics.masked_nll import MaskedNll
from pipeline.metrics.sums import Sums, as_json

NUMBERS = st.floats(-1e6, 1e6)
PAIRS = st.lists(st.tuples(NUMBERS, st.floats(0.5, 1e3)), min_size=1, max_size=20)


def sums_of(pairs):
    values, weights = zip(*pairs, strict=True)
    return Sums(values=values, weights=weights)


@given(PAIRS)
def test_mean_is_weighted_and_json_keeps_all(pairs):
    sums = sums_of(pairs)
    total = sum(weight for _, weight in pairs)
    assert sums.mean == pytest.approx(sum(value for value, _ in pairs) / total, rel=1e-9, abs=1e-6)
    assert Sums.of_json(json.loads(json.dumps(as_json(sums)))) == sums


@pytest.mark.parametrize(
    ("values", "weights", "match"),
    [
        ((1.0,), (), "1 values have 0 weights"),
        ((), (), "no mean"),
        ((1.0, 2.0), (0.0, 0.0), "no mean"),
        ((1.0, 2.0), (3.0, -1.0), "no mean"),
        ((1.0,), (math.nan,), "no mean"),
    ],
)
def test_no_mean_is_refused(values, weights, match):
    with pytest.raises(ValueError, match=match):
        Sums(values=values, weights=weights)


def test_results_become_json_with_or_without_samples():
    sums = Sums(values=(1.0, 5.0), weights=(2.0, 1.0))
    short = {"mean": 2.0, "count": 2}
    long = {"mean": 2.0, "values": [1.0, 5.0], "weights": [2.0, 1.0]}
    result = MaskedNll(bits=sums, by_level=(sums,))
    assert as_json(result) == {"bits": long, "by_level": [long]}
    assert as_json({"x": result, "y": None}, samples=False) == {"x": {"bits": short, "by_level": [short]}, "y": None}
    assert as_json(Interval(difference=1.0, low=0.0, high=2.0, count=3))["high"] == 2.0
    run = FreeRun(ids=((1, 2), (3, 4)), steps=((1, 1), (2, 1)), nfe=(1, 2))
    assert FreeRun.of_json(json.loads(json.dumps(as_json(run)))) == run
