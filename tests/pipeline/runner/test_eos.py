"""When an end-of-text may be committed."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pipeline.runner.eos import BANNED, eligible, forbid

EOS = 7


@st.composite
def blocks(draw):
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 8)))
    ids = draw(hnp.arrays(np.int64, shape, elements=st.sampled_from([EOS, 1])))
    p = draw(hnp.arrays(np.float64, shape, elements=st.sampled_from([0.1, 0.5, 0.9, 1.0])))
    return draw(hnp.arrays(bool, shape)), ids, p


def chosen(mode, block):
    masked, ids, p = block
    return eligible(mode, masked, ids, np.log(p), eos_id=EOS, eos_threshold=0.5 - 1e-9)


@pytest.mark.parametrize("mode", ["none", "forbid"])
@given(block=blocks())
def test_it_is_a_token_like_any_other(mode, block):
    assert np.array_equal(chosen(mode, block), block[0])


@given(blocks())
def test_last_waits_until_nothing_else_is_left(block):
    masked, ids, _ = block
    for row, m, i in zip(chosen("last", block), masked, ids, strict=True):
        others = m & (i != EOS)
        assert np.array_equal(row, others if others.any() else m)


@given(blocks())
def test_threshold_waits_until_it_is_sure_or_alone(block):
    masked, ids, p = block
    for row, m, i, q in zip(chosen("threshold", block), masked, ids, p, strict=True):
        settled = m & ((i != EOS) | (q >= 0.5))
        assert np.array_equal(row, settled if settled.any() else m)


def test_forbid_bans_the_id_and_leaves_the_bias_alone():
    bias = np.zeros(9, dtype=np.float32)
    banned = forbid(bias, EOS)
    assert np.flatnonzero(banned).tolist() == [EOS]
    assert banned[EOS] == BANNED
    assert not bias.any()
