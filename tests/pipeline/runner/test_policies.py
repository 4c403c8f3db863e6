"""Which positions are committed: counts, order, and that every row makes progress."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pipeline.runner.candidates import Candidates
from pipeline.runner.policies import POLICIES


@st.composite
def candidates(draw):
    shape = (draw(st.integers(1, 4)), draw(st.integers(1, 9)))
    # Few values, so that ties are common; 0 is a probability of 1.
    doubt = draw(hnp.arrays(np.float64, shape, elements=st.sampled_from([0.0, 1e-12, 0.1, 1 / 9, 0.2, 3.0, 1e30])))
    return Candidates(
        doubt=doubt,
        masked=draw(hnp.arrays(bool, shape)),
        quota=draw(hnp.arrays(np.int64, shape[:1], elements=st.integers(1, 12))),
        threshold=draw(st.sampled_from([0.1, 0.5, 0.9, 1.0])),
    )


@given(candidates())
def test_quota_takes_the_surest_masked_positions_the_earlier_first(c):
    picks = POLICIES["quota"](c)
    for b, row in enumerate(picks):
        order = sorted(np.flatnonzero(c.masked[b]), key=lambda j: (c.doubt[b, j], j))
        assert sorted(order[: c.quota[b]]) == np.flatnonzero(row).tolist()


@given(candidates())
def test_threshold_takes_all_that_are_sure_and_never_fewer_than_quota(c):
    picks = POLICIES["threshold"](c)
    sure = c.masked & (1 / (1 + c.doubt) >= c.threshold)
    assert np.array_equal(picks, sure | POLICIES["quota"](c))


@pytest.mark.parametrize("name", sorted(POLICIES))
@given(c=candidates())
def test_only_masked_positions_and_at_least_one(name, c):
    picks = POLICIES[name](c)
    assert not (picks & ~c.masked).any()
    assert np.array_equal(picks.any(axis=1), c.masked.any(axis=1))


@pytest.mark.parametrize("name", sorted(POLICIES))
@given(c=candidates())
def test_rows_do_not_know_of_each_other(name, c):
    together = POLICIES[name](c)
    for b in range(len(together)):
        alone = Candidates(
            doubt=c.doubt[b : b + 1], masked=c.masked[b : b + 1], quota=c.quota[b : b + 1], threshold=c.threshold
        )
        assert np.array_equal(POLICIES[name](alone)[0], together[b])
