"""Which positions are committed: each rule as its paper says it, and that every row makes progress on its own."""

from dataclasses import fields, replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pipeline.runner.candidates import GRID_END, Candidates, flip_share
from pipeline.runner.policies import DRAWN, POLICIES, WARM

# Few values, so that ties are common; 0 is a probability of 1.
DOUBTS = st.sampled_from([0.0, 1e-12, 0.1, 1 / 9, 0.2, 0.3, 1 / 3, 3.0, 1e30])
SHARES = st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.9, 1.0])


@st.composite
def candidates(draw):
    shape = (draw(st.integers(1, 4)), draw(st.integers(1, 14)))
    entropies = st.sampled_from([0.0, 1e-9, 0.03, 0.05, 0.07, 0.7, 2.0])
    return Candidates(
        doubt=draw(hnp.arrays(np.float64, shape, elements=DOUBTS)),
        neg_entropy=-draw(hnp.arrays(np.float64, shape, elements=entropies)),
        margin=draw(hnp.arrays(np.float64, shape, elements=SHARES)),
        masked=draw(hnp.arrays(bool, shape)),
        quota=draw(hnp.arrays(np.int64, shape[:1], elements=st.integers(1, 12))),
        flip=draw(hnp.arrays(np.float64, shape[:1], elements=SHARES)),
        draws=draw(hnp.arrays(np.float64, shape, elements=st.sampled_from([1e-9, 0.1, 0.3, 0.5, 0.99]))),
        threshold=draw(st.sampled_from([0.1, 0.5, 0.9, 1.0])),
        factor=draw(st.sampled_from([0.1, 0.5, 1.0, 2.0])),
        entropy_bound=draw(st.sampled_from([0.0, 0.05, 0.1, 3.0])),
    )


def block(doubt, masked):
    """A block of which only the doubts matter."""
    zeros = np.zeros_like(doubt)
    return Candidates(
        doubt=doubt,
        neg_entropy=zeros,
        margin=zeros,
        masked=masked,
        quota=np.array([1]),
        flip=np.zeros(1),
        draws=zeros,
        threshold=0.9,
        factor=1.0,
        entropy_bound=0.1,
    )


def row_of(c, b):
    """The candidates of one row alone."""
    values = {f.name: getattr(c, f.name) for f in fields(c)}
    return Candidates(**{k: v[b : b + 1] if isinstance(v, np.ndarray) else v for k, v in values.items()})


def expect(c, name, wanted):
    """`wanted(row, masked positions, p)` says what each row commits; quota-many of the surest are always in."""
    for b, picked in enumerate(POLICIES[name](c)):
        row = row_of(c, b)
        masked = np.flatnonzero(row.masked[0]).tolist()
        assert np.flatnonzero(picked).tolist() == sorted(wanted(row, masked, 1 / (1 + row.doubt[0])))


def first(count, positions, score):
    """The `count` positions with the lowest score, the earlier on ties."""
    return set(sorted(positions, key=lambda j: (score[j], j))[: int(count)])


@given(candidates())
def test_quota_takes_the_surest_masked_positions_the_earlier_first(c):
    expect(c, "quota", lambda row, masked, p: first(row.quota[0], masked, row.doubt[0]))


@given(candidates())
def test_threshold_takes_all_that_are_sure_and_never_fewer_than_quota(c):
    def wanted(row, masked, p):
        return {j for j in masked if p[j] >= row.threshold} | first(row.quota[0], masked, row.doubt[0])

    expect(c, "threshold", wanted)


@given(candidates())
def test_factor_takes_the_most_that_its_inequality_allows(c):
    """Fast-dLLM: the largest n with (n + 1)(1 - p of the n-th surest) < f."""

    def wanted(row, masked, p):
        order = sorted(masked, key=lambda j: (row.doubt[0, j], j))
        counts = [n for n, j in enumerate(order, start=1) if (n + 1) * (1 - p[j]) < row.factor - 1e-12]
        return set(order[: max(counts, default=0)]) | first(row.quota[0], masked, row.doubt[0])

    expect(c, "factor", wanted)


@given(candidates())
def test_entropy_bound_takes_the_longest_prefix_whose_sum_without_its_largest_fits(c):
    def wanted(row, masked, p):
        entropy = -row.neg_entropy[0]
        order = sorted(masked, key=lambda j: (entropy[j], j))
        fits = [n for n in range(1, len(order) + 1) if entropy[order[: n - 1]].sum() <= row.entropy_bound + 1e-12]
        return set(order[: max(fits, default=0)]) | first(row.quota[0], masked, entropy)

    # Sums of the sampled entropies that meet a bound exactly would be decided by rounding.
    expect(replace(c, entropy_bound=c.entropy_bound + 1e-7), "entropy_bound", wanted)


@given(candidates())
def test_quota_or_threshold_keeps_to_the_sure_ones_when_they_are_enough(c):
    def wanted(row, masked, p):
        sure = {j for j in masked if p[j] > row.threshold}
        return sure if len(sure) >= row.quota[0] else first(row.quota[0], masked, row.doubt[0])

    expect(c, "quota_or_threshold", wanted)


@given(candidates())
def test_dreams_policies_take_the_grids_count_by_their_score(c):
    for name in WARM:

        def wanted(row, masked, p, name=name):
            score = {"maskgit": row.doubt, "margin": -row.margin, "entropy": -row.neg_entropy}[name][0]
            return first(max(1, np.floor(len(masked) * row.flip[0])), masked, score)

        expect(c, name, wanted)


@given(candidates())
def test_origin_flips_each_mask_on_its_own(c):
    def wanted(row, masked, p):
        return {j for j in masked if row.draws[0, j] < row.flip[0]} or first(1, masked, row.draws[0])

    expect(c, "origin", wanted)


@given(candidates())
def test_random_takes_the_quota_without_looking_at_the_tokens(c):
    expect(c, "random", lambda row, masked, p: first(row.quota[0], masked, row.draws[0]))


@given(candidates())
def test_local_leap_trusts_the_neighbours_of_an_anchor_more(c):
    def wanted(row, masked, p):
        anchors = [j for j in masked if p[j] >= row.threshold]
        near = {j for j in masked if any(abs(j - a) <= 4 for a in anchors)}
        leaped = {j for j in near if p[j] >= row.threshold * 0.75 / 0.9}
        return set(anchors) | leaped | first(row.quota[0], masked, row.doubt[0])

    expect(c, "local_leap", wanted)


@given(candidates())
def test_hierarchy_splits_every_gap_at_its_surest(c):
    def wanted(row, masked, p):
        runs = []
        for j in masked:
            if runs and runs[-1][-1] == j - 1:
                runs[-1].append(j)
            else:
                runs.append([j])
        best = {min(run, key=lambda j: (row.doubt[0, j], j)) for run in runs}
        split = {j for j in best if p[j] >= row.threshold * 0.62 / 0.92}
        return {j for j in masked if p[j] >= row.threshold} | split | first(row.quota[0], masked, row.doubt[0])

    expect(c, "hierarchy", wanted)


def test_a_leap_reaches_four_positions_and_down_to_three_quarters():
    doubt = np.full((1, 14), 1 / 0.8 - 1)
    doubt[0, 5] = 0.0
    doubt[0, 7] = 1 / 0.74 - 1
    leap = POLICIES["local_leap"](block(doubt, np.ones((1, 14), dtype=bool)))
    assert np.flatnonzero(leap).tolist() == [1, 2, 3, 4, 5, 6, 8, 9]


@given(candidates())
def test_only_masked_positions_and_at_least_one(c):
    for policy in POLICIES.values():
        picks = policy(c)
        assert picks.dtype == bool
        assert not (picks & ~c.masked).any()
        assert np.array_equal(picks.any(axis=1), c.masked.any(axis=1))


@given(candidates())
def test_rows_do_not_know_of_each_other(c):
    for policy in POLICIES.values():
        together = policy(c)
        for b in range(len(together)):
            assert np.array_equal(policy(row_of(c, b))[0], together[b])


@given(candidates())
def test_draws_decide_only_where_it_is_said(c):
    other = replace(c, draws=1.0 - c.draws)
    for name in POLICIES.keys() - DRAWN:
        assert np.array_equal(POLICIES[name](c), POLICIES[name](other))


@given(st.integers(1, 200))
def test_the_time_grid_is_dreams(steps):
    """t goes evenly from 1 to eps; each mask goes at step k with 1 - t[k+1] / t[k], and all of them at the last."""
    t = np.linspace(1, GRID_END, steps + 1)
    step = np.arange(steps + 3)
    shares = flip_share(step, np.full_like(step, steps))
    np.testing.assert_allclose(shares[: steps - 1], (1 - t[1:] / t[:-1])[:-1], rtol=1e-9)
    assert (shares[steps - 1 :] == 1).all()


def test_a_hopeless_token_is_still_a_masked_one():
    c = block(np.array([[0.0, np.inf, 0.0]]), np.array([[False, True, False]]))
    assert POLICIES["quota"](c).tolist() == [[False, True, False]]
