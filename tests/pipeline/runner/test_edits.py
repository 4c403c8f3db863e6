"""Which committed tokens are replaced, and that replacing ends."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pipeline.backends.backend import Record
from pipeline.runner.edits import MAX_EXTRA, edits, is_final

SHAPE = (2, 5)


def record(best, tail):
    zeros = np.zeros(SHAPE, dtype=np.float32)
    ids = np.stack([best, best + 1], axis=-1)
    logits = np.zeros((*SHAPE, 2), dtype=np.float32)
    return Record(top_ids=ids, top_logits=logits, tail=tail, neg_entropy=zeros, lse_t=zeros)


IDS = hnp.arrays(np.int64, SHAPE, elements=st.integers(0, 2))


@given(
    IDS,
    IDS,
    hnp.arrays(np.float32, SHAPE, elements=st.sampled_from([0.0, 0.25, 1.0, 9.0])),
    hnp.arrays(bool, SHAPE),
    st.sampled_from([0.3, 0.5, 0.8, 1.0]),
)
def test_another_best_id_that_is_sure_replaces_a_committed_one(best, current, tail, editable, tau):
    found = edits(record(best, tail), current, editable, tau)
    for at in np.ndindex(SHAPE):
        assert found[at] == (editable[at] and best[at] != current[at] and 1 / (1 + tail[at]) > tau)


def test_a_block_is_final_when_a_pass_without_masks_changes_nothing():
    masks = np.array([[True, False], [False, False], [False, False], [False, False]])
    replaced = np.array([[False, False], [False, True], [False, False], [True, True]])
    extra = np.array([0, 1, 1, MAX_EXTRA])
    assert is_final(masks, replaced, extra).tolist() == [False, False, True, True]


@given(st.lists(st.booleans(), min_size=MAX_EXTRA, max_size=MAX_EXTRA))
def test_a_block_that_changes_for_ever_ends_all_the_same(changes):
    """Counted as the loop counts: passes that began without a mask."""
    none = np.zeros((1, 3), dtype=bool)
    passes = 0
    for extra, changed in enumerate(changes, start=1):
        passes = extra
        if is_final(none, none | changed, np.array([extra]))[0]:
            break
    assert passes == next((i for i, changed in enumerate(changes, start=1) if not changed), MAX_EXTRA)
