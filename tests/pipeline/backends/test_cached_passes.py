"""Passes over windows of a canvas in a cache: the bits of passes over the whole canvas, whatever stands beside them."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.backends.backend import Feeds, Ids, Record
from pipeline.backends.ort import OrtSession, open_session
from pipeline.folder import MODEL
from pipeline.runner.settings import Settings, read_settings
from pipeline.validation.cached import check_cache, record_difference
from pipeline.validation.feeds import feeds_of
from tests.conftest import Made
from tests.pipeline.random_models import tiny, write_model

LENGTH, WINDOW = 48, 16


@dataclass(frozen=True)
class Export:
    """A model's file, what its runner knows, and a session on it."""

    path: Path
    settings: Settings
    session: OrtSession

    @classmethod
    def of(cls, bundle: Path) -> "Export":
        return cls(bundle / MODEL, read_settings(bundle / "config.json"), open_session(bundle / MODEL, threads=1))


@pytest.fixture(scope="module")
def float_llada(whole_bundle: Path) -> Export:
    """Two layers, grouped heads."""
    return Export.of(whole_bundle)


@pytest.fixture(scope="module")
def dream(exported: Made) -> Export:
    """Two layers, 8-bit linears; rows of logits are shifted."""
    return Export.of(exported("rtn-w8a8", "dream"))


@pytest.fixture(scope="module")
def llada(exported: Made) -> Export:
    """Two layers, 4-bit linears."""
    return Export.of(exported("rtn-w4a4", "llada", tied=True))


@pytest.fixture(scope="module", params=["float_llada", "dream", "llada"])
def made(request: pytest.FixtureRequest) -> Export:
    found: Export = request.getfixturevalue(request.param)
    return found


def canvases(settings: Settings, kv_len: list[int], *, seed: int = 0) -> Feeds:
    """Half masked, one row for each length; every position is a head row."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(settings.vocab_size, (len(kv_len), LENGTH), generator=draw)
    ids = ids.masked_fill(torch.rand(ids.shape, generator=draw) < 0.5, settings.mask_id)
    return feeds_of(settings, ids, torch.tensor(kv_len), torch.arange(LENGTH).expand_as(ids).contiguous())


def window_of(feeds: Feeds, starts: list[int], size: int = WINDOW) -> Feeds:
    """The pass over `size` positions of each row from its start on."""
    positions: Ids = np.array(starts)[:, None] + np.arange(size)
    return replace(
        feeds,
        input_ids=np.take_along_axis(feeds.input_ids, positions, axis=1),
        position_ids=positions,
        head_index=np.broadcast_to(np.arange(size), positions.shape).copy(),
        write_start=positions[:, 0].copy(),
    )


def rows_of(feeds: Feeds, start: int, stop: int) -> Feeds:
    """Some rows of a batch."""
    taken = {name: array if name == "logit_bias" else array[start:stop] for name, array in feeds.as_dict().items()}
    given = None if feeds.write_start is None else feeds.write_start[start:stop]
    return Feeds(**taken, write_start=given)


def part_of(record: Record, rows: slice) -> Record:
    return Record(**{name: array[rows] for name, array in record.as_dict().items()})


def equal(found: Record, expected: Record) -> bool:
    return record_difference(found, expected) <= 0


def test_a_window_gives_the_bits_of_the_whole_canvas(made: Export) -> None:
    """All formats of test_export.py are proved by their export."""
    check = check_cache(made.session, made.settings, 0)
    assert (check.passes, check.largest) == (9, 0.0)


def test_the_first_token_of_a_block_comes_from_the_row_before_it(dream: Export) -> None:
    """Dream's window starts a row early, and the rest of it are rows of the block before."""
    assert dream.settings.shifted_logits
    feeds = canvases(dream.settings, [LENGTH, 40])
    block = np.arange(32, 40)
    whole = dream.session.run(replace(feeds, head_index=np.tile(block - 1, (2, 1))))
    cache = dream.session.allocate(2, LENGTH)
    dream.session.run(feeds, cache)
    window = window_of(feeds, [24, 30])
    heads = block - 1 - window.position_ids[:, :1]
    assert equal(dream.session.run(replace(window, head_index=heads), cache), whole)


@pytest.mark.parametrize("slots", [LENGTH + 16, LENGTH + 160])
def test_more_slots_change_nothing(made: Export, slots: int) -> None:
    feeds = canvases(made.settings, [LENGTH, 33, 1])
    narrow, wide = made.session.allocate(3, LENGTH), made.session.allocate(3, slots)
    expected = made.session.run(feeds)
    for cache in (narrow, wide):
        assert equal(made.session.run(feeds, cache), expected)
    window = window_of(feeds, [0, 20, 32])
    assert equal(made.session.run(window, wide), made.session.run(window, narrow))


def test_a_row_alone_is_the_row_in_any_batch_and_any_place(made: Export) -> None:
    feeds = canvases(made.settings, [LENGTH, 20, 35])
    window = window_of(feeds, [32, 5, 16])
    together = made.session.allocate(5, LENGTH)
    full, block = made.session.run(feeds, together, first_row=2), made.session.run(window, together, first_row=2)
    for row in range(3):
        alone = made.session.allocate(4, LENGTH)
        for place in (0, 3):
            found = made.session.run(rows_of(feeds, row, row + 1), alone, first_row=place)
            assert equal(found, part_of(full, slice(row, row + 1)))
            found = made.session.run(rows_of(window, row, row + 1), alone, first_row=place)
            assert equal(found, part_of(block, slice(row, row + 1)))
    pair = made.session.run(rows_of(window, 1, 3), together, first_row=3)
    assert equal(pair, part_of(block, slice(1, 3)))


def test_other_rows_and_slots_of_the_cache_stay(made: Export) -> None:
    feeds = canvases(made.settings, [LENGTH, LENGTH])
    cache = made.session.allocate(4, LENGTH + 16)
    for array in cache.arrays.values():
        array[:] = 7.0
    made.session.run(rows_of(window_of(feeds, [16, 20]), 0, 2), cache, first_row=1)
    for array in cache.arrays.values():
        kept = array == 7.0
        assert kept[[0, 3]].all()
        assert kept[1, :, :16].all()
        assert kept[1, :, 32:].all()
        assert not kept[1, :, 16:32].any()
        assert not kept[2, :, 20:36].any()


def test_the_cache_is_written_in_place(llada: Export, talkative: None, capfd: pytest.CaptureFixture[str]) -> None:
    """ONNX Runtime warns of each copy of a cache; unbound it has no choice, so the warning would be seen."""
    session = open_session(llada.path, threads=1)
    feeds = canvases(llada.settings, [LENGTH, 9, 30])
    cache = session.allocate(4, LENGTH + 16)
    places = {name: array.ctypes.data for name, array in cache.arrays.items()}
    capfd.readouterr()
    for _ in range(2):
        session.run(feeds, cache, first_row=1)
        session.run(window_of(feeds, [0, 16, 32]), cache, first_row=1)
        session.run(rows_of(feeds, 0, 1), cache, first_row=3)
        session.run(feeds)
    assert capfd.readouterr().err == ""
    assert {name: array.ctypes.data for name, array in cache.arrays.items()} == places
    start = {"write_start": np.zeros(3, np.int64)}
    session.inner.run(None, feeds.as_dict() | start | session.layout.empty(3, LENGTH))
    assert "copying past_cache" in capfd.readouterr().err


def test_a_runtime_that_places_windows_itself_gives_the_same_bits(float_llada: Export, tmp_path: Path) -> None:
    write_model(tiny(shifted=False), tmp_path / MODEL, sets=("lowering.cache=window",))
    sessions = float_llada.session, open_session(tmp_path / MODEL, threads=1)
    assert [session.layout.in_place for session in sessions] == [True, False]
    settings = float_llada.settings
    feeds, others = (
        canvases(settings, kv_len, seed=seed) for seed, kv_len in enumerate(([LENGTH, 21, 40], [LENGTH] * 3))
    )
    caches = [session.allocate(4, LENGTH + 16) for session in sessions]
    for each in (feeds, window_of(feeds, [0, 7, 32]), window_of(others, [9, 0, 16])):
        found = [session.run(each, kept, first_row=1) for session, kept in zip(sessions, caches, strict=True)]
        assert equal(*found)
        for past, array in caches[0].arrays.items():
            assert np.array_equal(array, caches[1].arrays[past]), past
    assert equal(*(session.run(feeds) for session in sessions))
    assert check_cache(sessions[1], settings, 0).equal


def test_what_leaves_the_cache_is_refused(float_llada: Export, llada: Export) -> None:
    session, feeds = float_llada.session, canvases(float_llada.settings, [LENGTH, LENGTH])
    cache = session.allocate(2, LENGTH)
    with pytest.raises(ValueError, match="windows of 16 lie in slots 16 to 49"):
        session.run(replace(window_of(feeds, [16, 32]), write_start=np.array([16, 33])), cache)
    with pytest.raises(ValueError, match="rows 1 to 3 lie outside a cache of 2 rows"):
        session.run(feeds, cache, first_row=1)
    with pytest.raises(ValueError, match="starts at row 0 and slot 0"):
        session.run(window_of(feeds, [16, 16]))
    with pytest.raises(ValueError, match="another session"):
        session.run(feeds, llada.session.allocate(2, LENGTH))
    assert cache.size_bytes == 2 * 2 * 2 * LENGTH * 16 * 4  # layers, keys and values, rows, one head, float32
