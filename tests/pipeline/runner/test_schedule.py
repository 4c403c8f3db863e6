"""Shares of steps and calls of a session."""

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.runner.schedule import quotas, runs, steps_of_block

PLACES = st.sets(st.integers(0, 30))


@given(st.integers(1, 80), st.lists(st.integers(1, 20), min_size=1, max_size=8))
def test_steps_are_shared_in_proportion(total, blocks):
    count = sum(blocks)
    shares = [steps_of_block(total, sum(blocks[:i]), sum(blocks[: i + 1]), count) for i in range(len(blocks))]
    assert min(shares) >= 1
    assert sum(shares) == total or min(shares) == 1
    exact = [total * masks / count for masks in blocks]
    assert all(abs(share - part) <= 1 for share, part in zip(shares, exact, strict=True))


@given(st.integers(1, 60), st.integers(1, 60))
def test_quotas_write_the_block_in_its_steps(masks, steps):
    owed = quotas(np.full(steps, masks), np.full(steps, steps), np.arange(steps))
    assert owed.sum() == masks
    assert owed.max() - owed.min() <= 1
    assert (np.diff(owed) <= 0).all()


@given(PLACES, PLACES, st.integers(0, 4))
def test_runs_cover_every_place_once_and_no_kept_one(places, others, gap):
    kept = others - places
    found = runs(sorted(places), gap=gap, bridged=lambda place: place not in kept)
    covered = [place for run in found for place in run]
    assert covered == sorted(set(covered))
    assert places <= set(covered)
    assert not kept & set(covered)
    for run in found:
        assert {run[0], run[-1]} <= places
        idle = "".join("x" if place in places else " " for place in run)
        assert " " * (gap + 1) not in idle
    for before, after in pairwise(found):
        between = set(range(before.stop, after.start))
        assert len(between) > gap or between & kept
