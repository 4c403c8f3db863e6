"""Blocks, quotas and early stop of one row."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.runner import GenerateOptions, Settings
from pipeline.runner.canvas import Canvases
from pipeline.runner.results import Request

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


class Row:
    """One canvas at the second of three places; the ones beside it are in use, too."""

    def __init__(self, request, settings=SETTINGS, **options):
        self.canvases = Canvases(3, settings, GenerateOptions(**options))
        for place in (0, 2):
            self.canvases.admit(place, Request(ids=[7] * (5 + place), request=place))
        self.canvases.admit(1, request)

    @property
    def block(self):
        return int(self.canvases.block_start[1]), int(self.canvases.block_stop[1])

    @property
    def open(self):
        return np.flatnonzero(self.canvases.open[1]).tolist()

    @property
    def finished(self):
        return bool(self.canvases.finished[1])

    def commit(self, *positions, token=9, final=True):
        """Write the token at these positions, nothing in the rows beside; the blocks that this settles."""
        blocks = self.canvases.blocks()
        picks = blocks.inside & np.isin(blocks.positions, positions) & (blocks.places == 1)[:, None]
        assert picks.sum() == len(positions), "a position lies outside the block"
        self.canvases.write(blocks, picks, np.full(picks.shape, token), np.full(picks.shape, -0.5))
        return self.canvases.settle(blocks, np.full(len(picks), final))

    def result(self):
        return self.canvases.release(1)


def canvas(prompt=(), **options):
    return Row(Request(ids=list(prompt), request=4), **options)


def run(row):
    """Commit `quota` positions of the block, first ones first; returns the commits of each step by block."""
    counts = {}
    while not row.finished:
        start, stop = row.block
        picked = [position for position in row.open if position < stop][: row.canvases.quota()[1]]
        assert picked, "a step owes nothing"
        counts.setdefault(start, []).append(len(picked))
        row.commit(*picked)
    return counts


@given(st.integers(1, 70), st.integers(1, 40), st.one_of(st.none(), st.integers(1, 90)))
def test_every_block_is_finished_in_its_share_of_the_steps(gen, block, steps):
    row = canvas(gen_length=gen, block_length=block, steps=steps)
    counts = run(row)
    sizes = [min(block, gen - s) for s in range(0, gen, block)]
    assert [sum(c) for c in counts.values()] == sizes
    assert row.canvases.step[1] <= max(steps or gen, len(sizes))
    if steps is not None and gen <= steps * min(sizes) and steps <= gen:
        assert row.canvases.step[1] == steps
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
    row.commit(2, 4)
    assert row.block == (2, 5)
    row.commit(3)
    assert row.block == (5, 7)
    row.commit(5, 6)
    assert row.finished
    result = row.result()
    assert (result.region, result.finish_reason) == ([9] * 5, "length")


def test_end_of_text_ends_the_row_once_nothing_before_it_is_open():
    row = canvas(prompt=[EOS], gen_length=8, block_length=4)  # an end-of-text in the prompt means nothing
    assert row.commit(3, token=EOS) == []
    assert row.commit(1) == []
    assert row.commit(2) == [(1, 1, 5)]
    assert row.finished
    result = row.result()
    assert result.ids == [9, 9]
    assert result.region == [9, 9, *[EOS] * 6]
    assert result.finish_reason == "eos"
    assert result.step_map == [2, 3, 1, 0, 0, 0, 0, 0]
    assert result.logprobs == [-0.5] * 3 + [0.0] * 5


def test_nothing_ends_before_its_block_is_final():
    row = canvas(gen_length=4, block_length=2)
    assert row.commit(0, token=EOS, final=False) == []
    assert row.commit(1, final=False) == []
    assert row.block == (0, 2)
    assert not row.finished
    assert row.commit(0, token=8) == [(1, 0, 2)]  # the end-of-text was written over
    assert row.block == (2, 4)


def test_a_mask_id_in_the_prompt_is_never_written():
    assert canvas(prompt=[MASK, 7], gen_length=2).open == [2, 3]


@pytest.mark.parametrize("first", [EOS, 9])
def test_an_answer_may_be_empty(first):
    row = canvas(gen_length=1)
    row.commit(0, token=first)
    assert row.result().ids == ([] if first == EOS else [9])


def test_only_the_masks_of_a_filled_canvas_are_written_and_no_end_of_text_ends_it():
    given = [5, MASK, 6, EOS, MASK, MASK, 7, 8, 8, MASK]
    row = Row(Request(ids=given, fill=True), gen_length=None, block_length=4)
    assert (row.block, row.open) == ((1, 5), [1, 4, 5, 9])
    assert row.commit(1, 4, token=EOS) == [(1, 1, 5)]
    assert row.block == (5, 9)
    row.commit(5)
    assert row.block == (9, 10)
    row.commit(9)
    assert row.finished
    result = row.result()
    assert result.region == result.ids == [5, EOS, 6, EOS, EOS, 9, 7, 8, 8, 9]
    assert result.finish_reason == "length"


@given(
    st.lists(st.sampled_from([MASK, 7]), min_size=1, max_size=40).filter(lambda ids: MASK in ids),
    st.integers(1, 9),
    st.one_of(st.none(), st.integers(1, 30)),
)
def test_a_filled_canvas_keeps_to_its_steps(given, block, steps):
    gen_length = None if steps is None else 1
    row = Row(Request(ids=given, fill=True), gen_length=gen_length, block_length=block, steps=steps)
    run(row)
    assert row.result().region == [9 if i == MASK else i for i in given]


def test_forced_ids_stand_from_the_start_and_shift_the_blocks():
    row = Row(Request(ids=[5], forced={0: 6, 3: 7, 4: EOS}), gen_length=6, block_length=2)
    assert row.canvases.region(1).tolist() == [6, MASK, MASK, 7, EOS, MASK]
    assert row.block == (2, 4)
    assert row.commit(2, 3) == [(1, 2, 4)]
    result = row.result()  # the forced end-of-text ends it, though no block holds it
    assert result.ids == [6, 9, 9, 7]
    assert result.step_map == [0, 1, 1, 0, 0, 0]


def test_a_canvas_without_a_length_grows_until_an_end_of_text():
    row = canvas(prompt=[5], gen_length=None, block_length=2)
    assert row.open == [1, 2]
    for start in (1, 3, 5):
        assert row.block == (start, start + 2)
        row.commit(start, start + 1)
    row.commit(7, token=EOS)
    assert row.finished
    assert row.result().region == [9] * 6 + [EOS] * 2


def test_forced_ids_wait_until_the_canvas_has_grown_to_them():
    row = Row(Request(ids=[5], forced={1: 6, 3: 7}), gen_length=None, block_length=2)
    assert row.canvases.region(1).tolist() == [MASK, 6]
    row.commit(1)
    assert row.canvases.region(1).tolist() == [9, 6, MASK, 7]
    assert row.open == [3]


@pytest.mark.parametrize(
    ("request_", "seen"),
    [(Request(ids=[5, 6]), [MASK, MASK, MASK, 9]), (Request(ids=[5, MASK, MASK, 6], fill=True), [MASK, MASK, 9, MASK])],
    ids=["prompt", "filled"],
)
def test_without_its_prompt_a_canvas_shows_what_steps_wrote(request_, seen):
    row = Row(request_, gen_length=2)
    row.commit(seen.index(9))
    rows = row.canvases.rows(np.array([1]), np.array([4]), np.zeros((1, 1), np.int64), guided=True)
    assert rows.promptless[0, :4].tolist() == seen


def test_a_canvas_grows_to_what_the_model_takes_and_no_further():
    row = Row(Request(ids=[5, 5]), replace(SETTINGS, max_length=7), gen_length=None, block_length=3)
    row.commit(2, 3, 4)
    assert row.block == (5, 7)
    row.commit(5, 6)
    assert row.finished
    assert row.result().finish_reason == "length"


def test_a_block_begins_with_a_full_pass_every_so_many():
    row = canvas(gen_length=10, block_length=2, refresh_every=2)
    needed = []
    while not row.finished:
        needed.append(bool(row.canvases.refresh[1]))
        row.commit(row.open[0])
    assert needed == [True, False, False, False] * 2 + [True, False]


def test_a_canvas_that_outgrows_its_slots_begins_anew():
    row = canvas(gen_length=None, block_length=16, refresh_every=1000)
    fresh = []
    for start in range(0, 160, 16):
        fresh.append(bool(row.canvases.refresh[1]))
        row.commit(*range(start, start + 16))
    sizes = [row.canvases.slots(start + 16) for start in range(0, 160, 16)]
    assert fresh == [True] + [now > before for before, now in pairwise(sizes)]
    assert False in fresh


def test_a_place_is_used_again_without_a_trace():
    row = canvas(prompt=[5] * 30, gen_length=8, block_length=4)
    row.commit(30, 33)
    cancelled = row.result()
    assert (cancelled.ids, cancelled.region) == ([9], [9, MASK, MASK, 9, *[MASK] * 4])
    assert row.canvases.free_place() == 1
    row.canvases.admit(1, Request(ids=[6] * 28, request=5))
    assert row.open == list(range(28, 36))
    assert row.canvases.ids[1].tolist()[36:] == [SETTINGS.pad_id] * (row.canvases.ids.shape[1] - 36)
    result = row.result()
    assert (result.request, result.nfe, set(result.step_map), set(result.logprobs)) == (5, 0, {0}, {0.0})


@pytest.mark.parametrize("following", [Request(ids=[6] * 28), Request(ids=[MASK] * 8 + [6] * 28, fill=True)])
def test_nothing_of_the_one_before_is_left_in_a_place(following):
    row = canvas(prompt=[5] * 30, gen_length=8, block_length=4)
    row.canvases.nfe_full[1] = row.canvases.nfe_block[1] = 1
    for start in (30, 34):
        row.commit(*range(start, start + 4))
    row.result()
    row.canvases.admit(1, following)
    first = Row(following, gen_length=8, block_length=4).canvases
    for name, array in vars(row.canvases).items():
        if isinstance(array, np.ndarray) and name not in ("live", "_counters"):  # the counters have names, too
            assert np.array_equal(array[1], getattr(first, name)[1]), name
