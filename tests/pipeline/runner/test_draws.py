"""Random numbers depend on their key only, and follow their law."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.runner.draws import uniform_rows
from tests.pipeline.runner.plain_loop import uniform

KEY = st.fixed_dictionaries(
    {"seed": st.integers(0, 2**63 - 1), "request": st.integers(0, 2**40), "step": st.integers(0, 10**6)}
)


@given(KEY, st.integers(0, 5000), st.integers(1, 12), st.integers(1, 12), st.data())
def test_a_position_draws_the_same_whatever_is_drawn_with_it(key, start, rows, columns, data):
    whole = uniform(**key, start=start, rows=rows, columns=columns)
    i = data.draw(st.integers(0, rows - 1))
    assert np.array_equal(uniform(**key, start=start + i, rows=1, columns=columns)[0], whole[i])
    assert ((whole > 0) & (whole < 1)).all()


@given(KEY, st.sampled_from(["seed", "request", "step", "start"]))
def test_every_part_of_the_key_counts(key, part):
    whole = {**key, "start": 7}
    other = {**whole, part: whole[part] ^ 1}
    assert not np.isin(uniform(**whole, rows=1, columns=9), uniform(**other, rows=1, columns=9)).any()


@given(st.lists(st.tuples(st.integers(0, 2**40), st.integers(0, 99), st.integers(0, 99)), min_size=1, max_size=4))
def test_a_request_draws_the_same_whatever_shares_its_batch(keys):
    requests, steps, starts = zip(*keys, strict=True)
    together = uniform_rows(seed=3, requests=requests, steps=steps, starts=starts, rows=5, columns=6)
    for (request, step, start), row in zip(keys, together, strict=True):
        assert np.array_equal(uniform(seed=3, request=request, step=step, start=start, rows=5, columns=6), row)


def test_the_stream_is_pinned():
    """These numbers must never change: seeds are part of what a user reports."""
    draw = uniform(seed=1, request=2, step=3, start=4, rows=1, columns=3)
    assert draw[0].tolist() == [0.8023431679793755, 0.6825007163308827, 0.06559481688247665]


def test_draws_are_uniform_over_positions_steps_and_requests():
    n, bins = 8_000, 16
    for column, key in enumerate(({"request": 1, "step": 0}, {"request": 0, "step": 1}, {"request": 0, "step": 0})):
        draw = uniform(seed=0, start=0, rows=n, columns=3, **key)[:, column]
        counts = np.bincount((draw * bins).astype(int), minlength=bins)
        assert ((counts - n / bins) ** 2 / (n / bins)).sum() <= 37.70  # 15 degrees of freedom, 0.1 %
