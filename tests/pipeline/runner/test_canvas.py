"""Blocks, quotas and early stop of one row."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.runner import GenerateOptions, Settings
from pipeline.runner.canvas import Canvas

EOS, MASK = 1, 2
SETTINGS = Settings(
    mask_id=MASK,
    eos_id=EOS,
    pad_id=0,
    shifted_logits=False,
    max_length=10_000,
    vocab_size=50,
    embedding_size=50,
    top_k=1,
)


def canvas(prompt=(), **options):
    return Canvas(list(prompt), 0, SETTINGS, GenerateOptions(**options))


def commit(row, *positions, token=9):
    row.commit(np.array(positions, dtype=np.int64), np.full(len(positions), token, dtype=np.int64))


def run(row):
    """Commit `quota` positions of the block, first ones first; returns the commits of each step by block."""
    counts = {}
    while not row.finished:
        start, end = row.block
        open_positions = start + np.flatnonzero(row.open[start:end])
        picked = open_positions[: row.quota]
        counts.setdefault(start, []).append(len(picked))
        commit(row, *picked)
    return counts


@given(st.integers(1, 70), st.integers(1, 40), st.one_of(st.none(), st.integers(1, 90)))
def test_every_block_is_finished_in_its_share_of_the_steps(gen, block, steps):
    row = canvas(gen_length=gen, block_length=block, steps=steps)
    counts = run(row)
    assert [sum(c) for c in counts.values()] == [min(block, gen - s) for s in range(0, gen, block)]
    blocks = -(-gen // block)
    assert row.nfe <= max(steps or gen, blocks)
    assert all(later <= earlier for c in counts.values() for earlier, later in pairwise(c))


@given(st.integers(1, 6), st.integers(1, 16), st.integers(1, 20))
def test_the_schedule_is_lladas_where_steps_divide(blocks, size, per_block):
    """LLaDA's get_num_transfer_tokens: base = m // T, the first m % T steps take one more."""
    row = canvas(gen_length=blocks * size, block_length=size, steps=blocks * per_block)
    wanted = [size // per_block + (t < size % per_block) for t in range(per_block)]
    assert list(run(row).values()) == [[n for n in wanted if n]] * blocks


def test_blocks_go_left_to_right_and_the_last_may_be_shorter():
    row = canvas(prompt=[5, 6], gen_length=5, block_length=3)
    assert row.block == (2, 5)
    commit(row, 2, 4)
    assert row.block == (2, 5)
    commit(row, 3)
    assert row.block == (5, 7)
    commit(row, 5, 6)
    assert row.finished
    assert row.result().region == [9] * 5
    assert row.result().finish_reason == "length"


def test_end_of_text_ends_the_row_once_nothing_before_it_is_open():
    row = canvas(prompt=[EOS], gen_length=8, block_length=4)  # an end-of-text in the prompt means nothing
    commit(row, 3, token=EOS)
    assert not row.finished
    commit(row, 1)
    assert not row.finished
    commit(row, 2)
    result = row.result()
    assert result.ids == [9, 9]
    assert result.region == [9, 9, *[EOS] * 6]
    assert (result.finish_reason, result.nfe) == ("eos", 3)


def test_a_mask_id_in_the_prompt_is_never_written():
    row = canvas(prompt=[MASK, 7], gen_length=2)
    assert np.flatnonzero(row.open).tolist() == [2, 3]


@pytest.mark.parametrize("first", [EOS, 9])
def test_an_answer_may_be_empty(first):
    row = canvas(gen_length=1)
    commit(row, 0, token=first)
    assert row.result().ids == ([] if first == EOS else [9])
