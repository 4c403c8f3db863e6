"""One forward pass for every live row: a full one, or a block pass over the window that its cache allows.

Rows that need a full pass and rows that need a block pass go through the session in calls of their own, each over a
contiguous range of a cache's rows. Place p of the batch is row p of every cache; which cache a row lives in depends on
its length. Shape letters: B batch, R head rows.
"""

from __future__ import annotations

import numpy as np

from pipeline.backends.backend import OUTPUTS, Cache, Feeds, Ids, Record
from pipeline.errors import ValidationFailed
from pipeline.runner.caches import ROOMY, Caches
from pipeline.runner.canvas import Blocks, Canvases
from pipeline.runner.monitor import Monitor
from pipeline.runner.schedule import BRIDGE, runs
from pipeline.runner.window import Terms, Window, block_feeds, full_feeds

Piece = tuple[Ids, Record]  # places, and the rows of each


class Passes:
    """Runs the session over the canvases of one generation; `close` gives its caches back."""

    def __init__(self, caches: Caches, canvases: Canvases, terms: Terms, monitor: Monitor) -> None:
        self.caches, self.canvases, self.terms, self.monitor = caches, canvases, terms, monitor
        self.session = session = caches.session
        self.cached = session.cached and not canvases.options.exact
        self.slots: Ids = np.zeros(len(canvases.requests), dtype=np.int64)  # of the cache that a place's row lives in
        self.opened: dict[int, Cache] = {}

    def run(self, blocks: Blocks) -> Record:
        """The record of the live rows' blocks [B, R]."""
        rows, places = self.canvases, blocks.places
        if not self.cached:
            rows.nfe_full[places] += 1
            given = rows.rows(places, rows.length[places], blocks.positions, guided=self.terms.guided)
            return self._pass(full_feeds(given, rows.window.shift, self.terms))
        full, first = rows.refresh[places], rows.block_step[places] == 0
        if not (full.any() or first.any()):  # most steps: host time counts
            rows.nfe_block[places] += 1
            return record_of(places, self._calls(blocks, places, rows.window))
        if full.any():
            self._house(places[full])
        watched = full & rows.follows[places] & rows.options.monitor
        entering = watched | ~full & first
        settled = ~full & ~entering
        rows.nfe_block[places] += ~full | watched
        rows.nfe_full[places] += full
        # The full passes last: they overwrite what a block pass leaves in the rows between its own.
        windows = self._calls(blocks, places[entering], rows.entry) + self._calls(blocks, places[settled], rows.window)
        canvases = self._calls(blocks, places[full], None)
        if watched.any():
            stale, fresh = (record_of(places[watched], pieces) for pieces in (windows, canvases))
            self.monitor.compare(places[watched], stale, fresh, blocks.masked[watched])
        return record_of(places, canvases + windows)

    def close(self) -> None:
        """Give the caches back; after a fault, `forget` them instead."""
        for cache in self.opened.values():
            self.caches.give_back(cache)
        self.forget()

    def forget(self) -> None:
        """Let the caches go: what they hold is not to be trusted."""
        self.opened.clear()

    def _house(self, places: Ids) -> None:
        """Give a cache to each of these rows that came, or outgrew its slots; all of them take a full pass next."""
        rows = self.canvases
        needed = {place: rows.slots(int(rows.length[place])) for place in places.tolist()}
        for place in sorted(needed, key=lambda place: -needed[place]):
            least = needed[place]
            if rows.nfe_full[place] and least <= self.slots[place]:
                continue
            fitting = [slots for slots in self.opened if least <= slots <= ROOMY * least]
            if not fitting:
                # One that grows would soon need another.
                most = rows.slots(rows.settings.max_length)
                wanted = min(ROOMY * least, most) if rows.options.gen_length is None else least
                cache = self.caches.take(len(rows.requests), max(wanted, least))
                self.opened[cache.slots] = cache
                fitting = [cache.slots]
            self.slots[place] = max(fitting)  # rows of one cache share a call
        for slots in set(self.opened) - set(self.slots[rows.live].tolist()):
            self.caches.give_back(self.opened.pop(slots))

    def _calls(self, blocks: Blocks, places: Ids, window: Window | None) -> list[Piece]:
        """Records of the rows at `places`, from as few calls as these allow; full passes without a window."""
        pieces = []
        for slots, cache in self.opened.items() if len(places) else ():
            here = places[self.slots[places] == slots]
            for span in runs(here.tolist(), gap=0 if window is None else BRIDGE, bridged=self._bridged):
                inside = here[(here >= span.start) & (here < span.stop)]
                record = self._pass(self._feeds(blocks, span, inside, window), cache, first_row=span.start)
                pieces.append((inside, _rows_of(record, inside - span.start)))
        return pieces

    def _bridged(self, place: int) -> bool:
        """Whether it does not matter what a pass leaves in this row: it is free, or written anew."""
        return self.canvases.requests[place] is None or bool(self.canvases.refresh[place])

    def _pass(self, feeds: Feeds, cache: Cache | None = None, *, first_row: int = 0) -> Record:
        """Raises ValidationFailed for NaN or infinity in any row, those between too: it would stay in the cache."""
        record = self.session.run(feeds, cache, first_row=first_row)
        if not (np.isfinite(record.tail).all() and np.isfinite(record.top_logits).all()):
            raise ValidationFailed("the model produced NaN or infinite logits; its bundle cannot be trusted")
        return record

    def _feeds(self, blocks: Blocks, span: range, used: Ids, window: Window | None) -> Feeds:
        """Inputs of a call over the places of `span`; those not `used` compute padding."""
        rows, count, at = self.canvases, len(span), used - span.start
        if count == len(used) == len(blocks.places):
            lengths, positions = rows.length[used], blocks.positions
        else:
            lengths, positions = np.ones(count, dtype=np.int64), np.zeros((count, rows.width), dtype=np.int64)
            lengths[at] = rows.length[used]
            positions[at] = blocks.positions[np.searchsorted(blocks.places, used)]
        given = rows.rows(slice(span.start, span.stop), lengths, positions, guided=self.terms.guided)
        if window is None:
            return full_feeds(given, rows.window.shift, self.terms)
        starts = np.zeros(count, dtype=np.int64)
        starts[at] = window.start(rows.block_start[used])
        return block_feeds(given, window, starts, self.terms)


def record_of(places: Ids, pieces: list[Piece]) -> Record:
    """The rows of these places, in their order; of two pieces that have a place, from the first."""
    if len(pieces) == 1 and len(pieces[0][0]) == len(places):
        return pieces[0][1]
    known = np.concatenate([each for each, _ in pieces])
    order = np.argsort(known, kind="stable")
    index = order[np.searchsorted(known, places, sorter=order)]
    records = [record.as_dict() for _, record in pieces]
    return Record(**{name: np.concatenate([record[name] for record in records])[index] for name in OUTPUTS})


def _rows_of(record: Record, index: Ids) -> Record:
    if len(index) == len(record.tail):
        return record
    return Record(**{name: array[index] for name, array in record.as_dict().items()})
