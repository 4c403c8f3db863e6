"""Windows lie where their block needs them, inside their cache, and do not depend on the batch."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.runner import GenerateOptions
from pipeline.runner.window import ALIGN, Rows, Terms, Window, aligned, block_feeds, block_width, bucket
from tests.pipeline.runner.stale_model import SETTINGS

LENGTHS = st.integers(1, 5000)


@given(LENGTHS)
def test_a_bucket_is_little_more_than_what_was_asked(slots):
    found = bucket(slots)
    assert found % ALIGN == 0
    assert slots <= found <= max(1.25 * slots, slots + ALIGN)
    assert bucket(slots - 1) <= found == bucket(found)


@given(LENGTHS)
def test_there_are_few_buckets(slots):
    assert len({bucket(n) for n in range(slots, 2 * slots)}) <= 6


@pytest.mark.parametrize(
    ("gen", "block", "width"),
    [(32, 8, 8), (8, 32, 8), (None, 32, 32), (1, 1, 1), (None, 2**31 - 1, SETTINGS.max_length)],
    ids=["many", "one", "grows", "short", "endless"],
)
def test_head_rows_are_the_block_or_the_canvas_if_shorter(gen, block, width):
    assert block_width(SETTINGS, GenerateOptions(gen_length=gen, block_length=block)) == width


@given(st.data())
def test_a_window_holds_block_and_vicinity_and_stays_in_its_slots(data):
    left, right, behind = (data.draw(st.integers(0, 40)) for _ in range(3))
    block = data.draw(st.integers(1, 40))
    shifted = data.draw(st.booleans())
    options = GenerateOptions(gen_length=None, block_length=block, vicinity=(left, right))
    window = Window.of(replace(SETTINGS, shifted_logits=shifted), options, behind=behind)
    lengths = np.array(data.draw(st.lists(st.integers(1, 150), min_size=1, max_size=4)))
    starts = np.array([data.draw(st.integers(0, length - 1)) for length in lengths])
    stops = np.minimum(starts + block, lengths)
    slots = window.slots(int(lengths.max()))
    ids = np.arange(len(lengths) * slots).reshape(len(lengths), slots)
    positions = np.minimum(starts[:, None] + np.arange(block), stops[:, None] - 1)
    first = window.start(starts)
    terms = Terms.of(options, np.zeros(3, np.float32))
    feeds = block_feeds(Rows(ids=ids, lengths=lengths, positions=positions, promptless=-ids), window, first, terms)
    query = feeds.input_ids.shape[1]
    assert query % ALIGN == 0
    assert (feeds.write_start == first).all()
    assert (first + query <= slots).all()
    for b in range(len(lengths)):
        inside = feeds.position_ids[b].tolist()
        assert inside == list(range(first[b], first[b] + query))
        low, high = max(starts[b] - left - behind - shifted, 0), min(stops[b] + right, lengths[b])
        assert inside[0] == low
        assert inside[-1] >= high - 1
        assert (feeds.input_ids[b] == ids[b, inside]).all()
        assert (feeds.promptless_ids[b] == -ids[b, inside]).all()
        asked = feeds.position_ids[b, feeds.head_index[b]]
        assert (asked == np.maximum(positions[b] - shifted, 0)).all()
        alone = min(window.rows, aligned(int(lengths[b])))
        # A longer row beside it may widen the window, but only behind the end of this one.
        assert query == alone or first[b] + alone >= lengths[b]
