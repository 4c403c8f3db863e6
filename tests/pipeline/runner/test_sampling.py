"""Tokens drawn from a top-K record follow the whole softmax, and their scores are those of the whole softmax."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pipeline.backends.backend import OUTPUTS, Record
from pipeline.runner.candidates import Candidates
from pipeline.runner.policies import POLICIES
from pipeline.runner.sampling import AGAIN, PLACE, TOKEN, keyed_draws, propose, settle
from plugins.record import record as record_of

V, K = 20, 4
# 0.1 % of the chi-square law, by degrees of freedom.
CRITICAL = {1: 10.83, 3: 16.27, 7: 24.32, 11: 31.26, 19: 43.82}
LOGITS = st.sampled_from([-30.0, -3.0, -1.0, 0.0, 0.5, 2.0, 2.25, 9.0, 60.0])


def record(logits, temperature=0.0, top_k=K):
    """The record of logits [B, R, V] at a temperature."""
    inverse = torch.full((len(logits),), 1 / temperature if temperature else 1.0)
    outputs = record_of(torch.from_numpy(logits).float(), torch.zeros(()), inverse, top_k)
    return Record(**dict(zip(OUTPUTS, (output.numpy() for output in outputs), strict=True)))


def softmax(logits, temperature=1.0, top_p=1.0):
    """The law of one row [V], its nucleus renormalised."""
    p = np.exp((logits - logits.max()) / temperature)
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    kept = order[np.cumsum(p[order]) - p[order] <= top_p]
    law = np.zeros_like(p)
    law[kept] = p[kept] / p[kept].sum()
    return law


def chi_square(ids, law):
    """The statistic and its degrees of freedom; an id that cannot be is an infinite one."""
    count, expected = np.bincount(ids, minlength=len(law)), len(ids) * law
    possible = law > 0
    assert expected[possible].min() > 4, "too few draws for the statistic"
    if count[~possible].any():
        return np.inf, possible.sum() - 1
    return ((count - expected)[possible] ** 2 / expected[possible]).sum(), possible.sum() - 1


def drawn(row, temperature, *, top_p=1.0, exact=True, count=8000):
    """Ids that `count` positions with the same logits draw, and how often the whole row was asked for."""
    logits = np.broadcast_to(row, (1, count, V)).astype(np.float32)
    asked = []

    def row_logits(b, r):
        asked.append((b, r))
        return logits[b, r]

    draws = keyed_draws(seed=5, requests=[2], steps=[0], starts=[0], rows=count)
    made = propose(
        record(logits, temperature),
        temperature=temperature,
        top_p=top_p,
        draws=draws,
        row_logits=row_logits if exact else None,
    )
    return made.ids[0], len(asked) / count


ROW = np.float32(np.random.default_rng(0).normal(size=V) * 1.5).astype(np.float64)


@pytest.mark.parametrize(
    ("temperature", "top_p", "freedom"),
    [(1.0, 1.0, 19), (2.0, 1.0, 19), (0.7, 0.5, 1), (1.0, 0.8, 7), (2.0, 0.8, 11)],
)
def test_the_law_is_that_of_the_whole_softmax(temperature, top_p, freedom):
    """In two of these the nucleus ends beyond the top-K, in one inside."""
    ids, _ = drawn(ROW, temperature, top_p=top_p)
    statistic, degrees = chi_square(ids, softmax(ROW, temperature, top_p))
    assert degrees == freedom
    assert statistic <= CRITICAL[freedom]


def test_a_row_is_asked_for_as_often_as_the_top_k_lacks_the_token():
    for temperature in (0.5, 1.0, 2.0):
        _, asked = drawn(ROW, temperature)
        beyond = 1 - np.sort(softmax(ROW, temperature))[-K:].sum()
        assert abs(asked - beyond) <= 5 * np.sqrt(beyond * (1 - beyond) / 8000)


def test_a_nucleus_inside_the_top_k_never_asks():
    assert drawn(ROW, 1.0, top_p=0.5)[1] == 0.0


def test_only_wanted_rows_are_asked_for():
    logits, asked = np.zeros((2, 3, V)), []

    def row_logits(b, r):
        asked.append((b, r))
        return logits[b, r]

    wanted = np.array([[True, False, False], [False, True, True]])
    draws = np.full((2, 3, 3), 0.99)
    made = propose(record(logits, 1.0), temperature=1.0, draws=draws, row_logits=row_logits, wanted=wanted)
    assert asked == [(0, 0), (1, 1), (1, 2)]
    assert np.array_equal(made.unknown, ~wanted)
    assert np.array_equal(made.ids >= 0, wanted)


@pytest.mark.parametrize("name", ["quota", "threshold", "factor", "local_leap", "hierarchy", "random", "entropy_bound"])
def test_asking_where_it_is_picked_picks_what_asking_everywhere_does(name):
    """A record of 4 of 20 logits, flat enough that about half of all draws lie beyond it."""
    rng = np.random.default_rng(7)
    fewer = 0
    for step in range(40):
        logits = np.float32(rng.normal(size=(2, 9, V)) * rng.choice([0.5, 2.0, 6.0], size=(2, 9, 1)))
        masked, asked = rng.random((2, 9)) < 0.7, set()
        draws = keyed_draws(seed=step, requests=[0, 1], steps=[0, 0], starts=[0, 0], rows=9)

        def proposing(wanted, logits=logits, draws=draws, asked=asked):
            def row_logits(b, r):
                asked.add((b, r))
                return logits[b, r]

            whole = record(logits, 1.0)
            return propose(whole, temperature=1.0, draws=draws, row_logits=row_logits, wanted=wanted)

        def picking(proposal, masked=masked, draws=draws):
            return POLICIES[name](
                Candidates(
                    doubt=proposal.doubt,
                    neg_entropy=proposal.neg_entropy,
                    margin=proposal.margin,
                    masked=masked,
                    quota=np.array([2, 3]),
                    flip=np.full(2, 0.3),
                    draws=draws[..., PLACE],
                    threshold=0.4,
                    factor=1.2,
                    entropy_bound=0.5,
                )
            )

        proposal, picks = settle(proposing, picking)
        fewer += len(asked)
        everything = proposing(None)
        fewer -= len(asked)
        assert np.array_equal(picks, picking(everything))
        assert np.array_equal(proposal.ids[picks], everything.ids[picks])
        assert np.array_equal(proposal.log_probability[picks], everything.log_probability[picks])
    assert fewer < -100


def test_without_rows_to_ask_for_the_top_k_shares_the_law():
    ids, asked = drawn(ROW, 1.0, exact=False)
    law = softmax(ROW)
    law[np.argsort(-law)[K:]] = 0
    assert asked == 0
    assert chi_square(ids, law / law.sum())[0] <= CRITICAL[3]


def test_a_cold_draw_is_not_misled_by_the_rounding_of_its_sum():
    """At T = 0.001 the log-sum-exp is 60,000 and rounded by 0.002; nothing at all lies beyond the best token."""
    row = np.full(V, 59.0)
    for best in (60.0, 60.001, 60.002, 60.003):  # rounded up in some of these
        row[7] = best
        ids, asked = drawn(row, 1e-3)
        assert set(ids) == {7}
        assert asked == 0.0


def test_cold_scores_still_tell_sure_from_surer():
    logits = np.full((1, 2, V), -40.0)
    logits[0, :, 0], logits[0, 0, 1], logits[0, 1, 1] = 20.0, 10.0, 9.0
    draws = keyed_draws(seed=0, requests=[0], steps=[0], starts=[0], rows=2)
    made = propose(record(logits, 0.2), temperature=0.2, warm=True, draws=draws)
    np.testing.assert_allclose(made.doubt, [[np.exp(-50), np.exp(-55)]], rtol=1e-5)


@given(hnp.arrays(np.float64, (2, 3, V), elements=LOGITS))
def test_the_best_token_has_the_scores_of_the_whole_softmax(logits):
    made = propose(record(logits))
    for b, r in np.ndindex(2, 3):
        law = softmax(logits[b, r])
        best = int(np.argmax(logits[b, r]))
        assert made.ids[b, r] == best
        others = np.delete(np.exp(logits[b, r] - logits[b, r].max()), best).sum()
        ordered = np.sort(law)
        entropy = -(law[law > 0] * np.log(law[law > 0])).sum()
        np.testing.assert_allclose(made.doubt[b, r], others, rtol=1e-6, atol=1e-30)
        np.testing.assert_allclose(made.margin[b, r], ordered[-1] - ordered[-2], rtol=1e-6, atol=1e-12)
        np.testing.assert_allclose(made.neg_entropy[b, r], -entropy, rtol=1e-5, atol=1e-9)
        np.testing.assert_allclose(made.log_probability[b, r], np.log(law[best]), rtol=1e-6, atol=1e-12)


@given(
    hnp.arrays(np.float64, (1, 2, V), elements=LOGITS),
    st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    st.sampled_from([0.31, 0.71, 1.0]),
)
def test_warm_scores_are_those_of_the_law_that_is_drawn_from(logits, temperature, top_p):
    draws = keyed_draws(seed=1, requests=[0], steps=[0], starts=[0], rows=2)
    # With every logit in the record nothing is approximate.
    made = propose(record(logits, temperature, top_k=V), temperature=temperature, top_p=top_p, warm=True, draws=draws)
    for r in range(2):
        law, clean = softmax(logits[0, r], temperature or 1.0, top_p), softmax(logits[0, r])
        token, ordered = made.ids[0, r], np.sort(law)
        entropy = -(law[law > 0] * np.log(law[law > 0])).sum()
        np.testing.assert_allclose(1 / (1 + made.doubt[0, r]), law[token], rtol=1e-5)
        np.testing.assert_allclose(made.margin[0, r], ordered[-1] - ordered[-2], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(-made.neg_entropy[0, r], entropy, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(made.log_probability[0, r], np.log(clean[token]), rtol=1e-4, atol=1e-5)
        assert temperature > 0 or token == np.argmax(logits[0, r])


@given(
    hnp.arrays(np.float64, (4, 3, V), elements=LOGITS),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.sampled_from([0.7, 1.0]),
    st.booleans(),
)
def test_a_row_alone_is_the_row_in_a_batch(logits, temperature, top_p, warm):
    keys = {"requests": [4, 4, 1, 0], "steps": [0, 3, 3, 9], "starts": [5, 5, 8, 0]}
    whole, single = record(logits, temperature), {"temperature": temperature, "top_p": top_p, "warm": warm}
    draws = keyed_draws(seed=3, rows=3, **keys)
    together = propose(whole, draws=draws, row_logits=lambda b, r: np.float32(logits[b, r]), **single)
    for b in range(4):
        alone = propose(
            Record(**{name: array[b : b + 1] for name, array in whole.as_dict().items()}),
            draws=keyed_draws(seed=3, rows=3, **{name: key[b : b + 1] for name, key in keys.items()}),
            row_logits=lambda _, r, b=b: np.float32(logits[b, r]),
            **single,
        )
        for name, array in vars(alone).items():
            assert np.array_equal(array[0], getattr(together, name)[b])


def test_draws_for_token_place_and_second_try_differ():
    draws = keyed_draws(seed=0, requests=[1], steps=[0], starts=[0], rows=50)
    assert draws.shape == (1, 50, 3)
    assert len(np.unique(draws)) == 150
    assert sorted({TOKEN, PLACE, AGAIN}) == [0, 1, 2]


def test_nothing_is_drawn_without_draws():
    with pytest.raises(ValueError, match="expected draws"):
        propose(record(np.zeros((1, 1, V)), 1.0), temperature=1.0)


def test_one_logit_a_row_is_enough_for_a_greedy_run():
    logits = np.array([[[0.0, np.log(3.0)]]])
    made = propose(record(logits, top_k=1))
    np.testing.assert_allclose([made.ids[0, 0], made.doubt[0, 0], made.margin[0, 0]], [1, 1 / 3, 0.5], rtol=1e-6)
