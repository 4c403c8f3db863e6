"""Passes over windows of a canvas against passes over all of it: on equal ids they are equal bit for bit.

Every row has a window of its own, in a cache that is longer and wider than the canvases. Before each compared pass
another one fills the window with masks, so that it has something to undo.
Shape letters: B batch, L canvas, Q query rows.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from pipeline.backends.backend import Cache, Feeds, Ids, Record, Session
from pipeline.runner.settings import Settings
from pipeline.validation.feeds import SWEEP_NOISE, feeds_of

BATCH, LENGTH, WINDOW = 3, 48, 16  # 16, or a multiple, is what the runner takes


@dataclass(frozen=True, kw_only=True)
class CacheCheck:
    """How many passes were compared and the largest difference of any number in their records, infinite for ids."""

    passes: int
    largest: float

    @property
    def equal(self) -> bool:
        return self.largest <= 0.0


def check_cache(session: Session, settings: Settings, seed: int) -> CacheCheck:
    """Windows at the start, in the middle and at the end of random canvases of every noise level."""
    differences = []
    for feeds in _canvases(settings, seed):
        batch, length = feeds.input_ids.shape
        cache = session.allocate(batch + 1, length + WINDOW)
        session.run(feeds, cache, first_row=1)
        starts = np.linspace(0, length - min(WINDOW, length), BATCH).astype(np.int64)
        for turn in range(BATCH):
            window = _Window(feeds, np.roll(starts, turn)[:, None] + np.arange(min(WINDOW, length)))
            differences.append(window.difference(session, cache, settings.mask_id))
    return CacheCheck(passes=len(differences), largest=float(np.max(differences)))  # Python's max may hide a NaN


def _canvases(settings: Settings, seed: int) -> Iterator[Feeds]:
    draw = torch.Generator().manual_seed(seed)
    length = min(LENGTH, settings.max_length)
    for noise in SWEEP_NOISE:
        ids = torch.randint(settings.vocab_size, (BATCH, length), generator=draw)
        ids = ids.masked_fill(torch.rand(ids.shape, generator=draw) < noise, settings.mask_id)
        kv_len = torch.randint(1, length + 1, (BATCH,), generator=draw)
        kv_len[0] = length
        yield feeds_of(settings, ids, kv_len, torch.arange(length).expand_as(ids).contiguous())


@dataclass(frozen=True)
class _Window:
    """Positions [B, Q], contiguous in each row, of the canvases of a full pass."""

    feeds: Feeds
    positions: Ids

    def difference(self, session: Session, cache: Cache, mask_id: int) -> float:
        """Of the record of a pass over these positions alone; NaN for NaN."""
        full = session.run(replace(self.feeds, head_index=self.positions))
        block = replace(
            self.feeds,
            input_ids=np.take_along_axis(self.feeds.input_ids, self.positions, axis=1),
            position_ids=self.positions,
            head_index=np.broadcast_to(np.arange(self.positions.shape[1]), self.positions.shape),
            write_start=self.positions[:, 0],
        )
        session.run(replace(block, input_ids=np.full_like(block.input_ids, mask_id)), cache, first_row=1)
        return record_difference(session.run(block, cache, first_row=1), full)


def record_difference(found: Record, expected: Record) -> float:
    """The largest of any two floats, infinite where ids differ."""
    if not np.array_equal(found.top_ids, expected.top_ids):
        return float("inf")
    pairs = zip(list(found.as_dict().values())[1:], list(expected.as_dict().values())[1:], strict=True)
    return float(np.max([np.abs(a.astype(np.float64) - b).max() for a, b in pairs]))
