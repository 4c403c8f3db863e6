"""The proof of the cache sees a cache that is wrong: one that is not written, not read, or written elsewhere."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.backends.backend import Feeds, Record
from pipeline.backends.ort import OrtSession, open_session
from pipeline.backends.ort_cache import OrtCache
from pipeline.folder import MODEL
from pipeline.runner.settings import Settings, read_settings
from pipeline.validation.cached import CacheCheck, check_cache, record_difference

Spoil = Callable[[Feeds, OrtCache], Feeds]


class Spoilt:
    """A session that does something to the feeds or the cache before every pass over a window."""

    def __init__(self, inner: OrtSession, spoil: Spoil) -> None:
        self.inner, self.spoil, self.top_k, self.cached = inner, spoil, inner.top_k, True

    def allocate(self, batch: int, slots: int) -> OrtCache:
        return self.inner.allocate(batch, slots)

    def run(self, feeds: Feeds, cache: OrtCache | None = None, *, first_row: int = 0) -> Record:
        if cache is not None and feeds.write_start is not None:
            feeds = self.spoil(feeds, cache)
        return self.inner.run(feeds, cache, first_row=first_row)

    def close(self) -> None:
        self.inner.close()


def one_slot_late(feeds: Feeds, cache: OrtCache) -> Feeds:
    assert feeds.write_start is not None
    return replace(feeds, write_start=feeds.write_start + 1)


def values_forgotten(feeds: Feeds, cache: OrtCache) -> Feeds:
    cache.arrays["past_v_1"][2] = 0.0
    return feeds


def padding_seen(feeds: Feeds, cache: OrtCache) -> Feeds:
    return replace(feeds, kv_len=feeds.kv_len + 1)


def not_a_number(feeds: Feeds, cache: OrtCache) -> Feeds:
    cache.arrays["past_k_0"][1] = np.nan
    return feeds


@pytest.fixture(scope="module")
def opened(whole_bundle: Path) -> tuple[OrtSession, Settings]:
    return open_session(whole_bundle / MODEL, threads=1), read_settings(whole_bundle / "config.json")


def test_a_right_cache_is_equal(opened: tuple[OrtSession, Settings]) -> None:
    check = check_cache(*opened, 3)
    assert (check.passes, check.largest, check.equal) == (9, 0.0, True)


@pytest.mark.parametrize("spoil", [one_slot_late, values_forgotten, padding_seen, not_a_number])
def test_a_wrong_one_is_not(opened: tuple[OrtSession, Settings], spoil: Spoil) -> None:
    session, settings = opened
    assert not check_cache(Spoilt(session, spoil), settings, 3).equal


def test_a_short_model_has_short_windows(opened: tuple[OrtSession, Settings]) -> None:
    session, settings = opened
    for length in (2, 5, 17):
        assert check_cache(session, replace(settings, max_length=length), 0).equal


def test_other_ids_and_not_a_number_are_no_small_difference() -> None:
    shape = (1, 2)
    ids, numbers = np.zeros((*shape, 1), np.int64), np.zeros(shape, np.float32)
    record = Record(top_ids=ids, top_logits=numbers[..., None], tail=numbers, neg_entropy=numbers, lse_t=numbers)
    assert record_difference(record, record) == 0
    assert record_difference(replace(record, top_ids=ids + 1), record) == float("inf")
    assert record_difference(replace(record, tail=numbers + 0.5), record) == 0.5
    assert np.isnan(record_difference(replace(record, lse_t=numbers + np.nan), record))
    assert not CacheCheck(passes=1, largest=float("nan")).equal
