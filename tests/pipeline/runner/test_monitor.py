"""Counts of agreement by place."""

import numpy as np

from pipeline.runner.monitor import Monitor
from tests.pipeline.runner.stale_model import record_of


def test_agreement_is_the_share_of_open_rows_with_equal_best_ids():
    monitor = Monitor(3)
    tail = np.ones((2, 4))
    stale = record_of(np.array([[1, 2, 3, 4], [5, 6, 7, 8]]), tail)
    fresh = record_of(np.array([[1, 9, 3, 9], [5, 6, 7, 8]]), tail)
    masked = np.array([[True, True, True, False], [False, True, False, False]])
    monitor.compare(np.array([0, 2]), stale, fresh, masked)
    assert [monitor.agreement(place) for place in range(3)] == [2 / 3, None, 1.0]
    monitor.compare(np.array([0, 2]), stale, stale, masked & [[True], [False]])
    assert monitor.agreement(0) == 5 / 6
    monitor.begin(0)
    assert monitor.agreement(0) is None
