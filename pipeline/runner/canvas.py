"""The canvases of a batch, one a place: ids, block pointers, step counters and what was written when.

A canvas is given ids (a prompt) followed by the region to write, or, filled, any ids with masks among them. It is
written block by block; every number of a place is its own, never the batch's, and arrays hold all places because the
loop must not cost a Python statement a row and step. Shape letters: B batch, R head rows (the block).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.backends.backend import Ids
from pipeline.runner.candidates import Picks, Scores
from pipeline.runner.results import Request, Result
from pipeline.runner.schedule import quotas, steps_of_block
from pipeline.runner.settings import GenerateOptions, Settings
from pipeline.runner.window import Rows, Window, block_width


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """Where the live rows write next."""

    places: Ids  # [B] ascending
    positions: Ids  # [B, R] canvas positions; a block shorter than R repeats its last one
    inside: Picks  # [B, R] whether the position is the block's, not a repetition
    masked: Picks  # [B, R] whether it is still to be written


class Canvases:
    """State of `places` rows; the arrays that loop, windows and schedule read are public."""

    def __init__(self, places: int, settings: Settings, options: GenerateOptions) -> None:
        self.settings, self.options = settings, options
        self.width = block_width(settings, options)
        self.window = Window.of(settings, options)
        self.entry = Window.of(settings, options, behind=self.width)  # of the first pass of a block, if no full one
        self.requests: list[Request | None] = [None] * places
        self.live: Ids = np.zeros(0, dtype=np.int64)
        self.ids: Ids = np.zeros((places, 0), dtype=np.int64)
        self.open: npt.NDArray[np.bool_] = np.zeros((places, 0), dtype=bool)  # masks to write
        self.given: npt.NDArray[np.bool_] = np.zeros((places, 0), dtype=bool)  # what guidance leaves out
        self.step_map: Ids = np.zeros((places, 0), dtype=np.int64)
        self.logprobs: Scores = np.zeros((places, 0))
        self.finished: npt.NDArray[np.bool_] = np.zeros(places, dtype=bool)
        self.refresh: npt.NDArray[np.bool_] = np.zeros(places, dtype=bool)  # the next pass must be a full one
        # Whether the cache, were it not refreshed, would do for the block: it holds all but the block right before it.
        self.follows: npt.NDArray[np.bool_] = np.zeros(places, dtype=bool)
        counters = np.zeros((13, places), dtype=np.int64)
        self.start, self.length, self.block_start, self.block_stop = counters[:4]
        self.block_index, self.block_masks, self.block_steps, self.block_step = counters[4:8]
        self.step, self.nfe_full, self.nfe_block = counters[8:11]
        self._masks, self._masks_before = counters[11:]  # of the whole canvas, and in blocks behind
        self._counters = counters

    def admit(self, place: int, request: Request) -> None:
        """Begin a request at a free place."""
        given = np.asarray(request.ids, dtype=np.int64)
        start = 0 if request.fill else len(given)
        self.requests[place] = request
        self._renew_live()
        self._counters[:, place] = 0
        self.start[place], self.length[place] = start, len(given)
        self._reserve(len(given))
        for array in (self.open, self.given, self.step_map, self.logprobs):
            array[place] = 0
        self.ids[place, : len(given)] = given
        self.ids[place, len(given) :] = self.settings.pad_id
        self.given[place, : len(given)] = given != self.settings.mask_id if request.fill else True
        self.finished[place] = self.follows[place] = False
        if request.fill:
            self.open[place, : len(given)] = given == self.settings.mask_id
        else:
            self._extend(place, self.options.gen_length or self.width)
        self._masks[place] = np.count_nonzero(self.open[place])
        self._enter(place, start)

    def release(self, place: int) -> Result:
        """End the request of this place, which becomes free."""
        request = self.request_of(place)
        self.requests[place] = None
        self._renew_live()
        region = self.region(place).tolist()
        span = slice(int(self.start[place]), int(self.length[place]))
        ended = self.settings.eos_id in region and not request.fill
        ids = region[: region.index(self.settings.eos_id)] if ended else region
        if self.open[place].any():  # not finished, so cancelled: what has no gap before it
            ids = ids[: int(self.open[place, span].argmax())]
        return Result(
            request=request.request,
            ids=ids,
            region=region,
            finish_reason="eos" if ended else "length",
            nfe_full=int(self.nfe_full[place]),
            nfe_block=int(self.nfe_block[place]),
            step_map=self.step_map[place, span].tolist(),
            logprobs=self.logprobs[place, span].tolist(),
        )

    def free_place(self) -> int | None:
        """The first place without a request."""
        return self.requests.index(None) if None in self.requests else None

    def request_of(self, place: int) -> Request:
        """The request at a place that has one."""
        request = self.requests[place]
        assert request is not None, f"place {place} is free"
        return request

    def written(self, place: int) -> Ids:
        """Ids that steps wrote, end-of-text left out."""
        kept = (self.step_map[place] > 0) & (self.ids[place] != self.settings.eos_id)
        return np.asarray(self.ids[place, kept])

    def allowed(self, place: int) -> list[tuple[int, Collection[int]]]:
        """Open positions of the block, from its start on, that may get certain ids only."""
        start, stop, origin = (int(array[place]) for array in (self.block_start, self.block_stop, self.start))
        return [
            (origin + position - start, ids)
            for position, ids in self.request_of(place).allowed.items()
            if start <= origin + position < stop and self.open[place, origin + position]
        ]

    def blocks(self) -> Blocks:
        """The blocks of the live rows."""
        places = self.live
        positions = self.block_start[places][:, None] + np.arange(self.width, dtype=np.int64)
        stops = self.block_stop[places][:, None]
        inside = positions < stops
        positions = np.minimum(positions, stops - 1)
        return Blocks(
            places=places,
            positions=positions,
            inside=inside,
            masked=inside & self.open[places[:, None], positions],
        )

    def rows(self, places: Ids | slice, lengths: Ids, positions: Ids, *, guided: bool) -> Rows:
        """The canvases at these places as a pass takes them."""
        ids = self.ids[places]
        promptless = np.where(self.given[places], self.settings.mask_id, ids) if guided else None
        return Rows(ids=ids, lengths=lengths, positions=positions, promptless=promptless)

    def quota(self) -> Ids:
        """Least commits of the live rows in this step [B]."""
        live = self.live
        return quotas(self.block_masks[live], self.block_steps[live], self.block_step[live])

    def write(self, blocks: Blocks, picks: Picks, ids: Ids, log_probability: Scores) -> None:
        """Write the picked ids [B, R] of one step of every live row."""
        b, r = np.nonzero(picks)
        rows, columns = blocks.places[b], blocks.positions[b, r]
        self.ids[rows, columns] = ids[b, r]
        self.open[rows, columns] = False
        self.step[blocks.places] += 1
        self.block_step[blocks.places] += 1
        self.step_map[rows, columns] = self.step[rows]
        self.logprobs[rows, columns] = log_probability[b, r]
        self.refresh[blocks.places], self.follows[blocks.places] = False, True

    def settle(self, blocks: Blocks, final: npt.NDArray[np.bool_]) -> list[tuple[int, int, int]]:
        """End rows that are answered, let rows whose block is written enter the next one: (place, start, stop) of each.

        `final` [B] says for which rows nothing in the block can change any more but its masks.
        """
        index = blocks.places[:, None], blocks.positions
        masked = blocks.inside & self.open[index]
        ends = blocks.inside & (self.ids[index] == self.settings.eos_id) & ~masked
        # Later commits cannot change what stands before an end-of-text with no mask in front of it.
        answered = ends.any(axis=1) & ~(masked & (np.cumsum(ends, axis=1) == 0)).any(axis=1)
        settled = []
        for b in np.flatnonzero(final & (answered | ~masked.any(axis=1))).tolist():
            place = int(blocks.places[b])
            start, stop = int(self.block_start[place]), int(self.block_stop[place])
            if answered[b] and self._ends(place):
                self.finish(place)
            elif not masked[b].any():
                self._masks_before[place] += self.block_masks[place]
                self.block_index[place] += 1
                self._enter(place, stop)
            else:
                continue
            settled.append((place, start, stop))
        return settled

    def finish(self, place: int) -> None:
        """Nothing more is written: what is open becomes end-of-text."""
        self.ids[place, self.open[place]] = self.settings.eos_id
        self.open[place] = False
        self.finished[place] = True

    def slots(self, length: int) -> int:
        """Slots for a canvas of `length` and any window in it."""
        return self.entry.slots(length)

    def region(self, place: int) -> Ids:
        """A copy of the generated part."""
        return self.ids[place, self.start[place] : self.length[place]].copy()

    def _enter(self, place: int, at: int) -> None:
        """Begin the block at the first open position from `at` on, or finish the canvas."""
        length = int(self.length[place])
        ahead = self.open[place, at:length]
        begin = at + int(ahead.argmax()) if ahead.any() else length
        # A forced end-of-text may stand between two blocks.
        if self._ends(place) and (self.ids[place, at:begin] == self.settings.eos_id).any():
            self.finish(place)
        elif begin < length:
            stop = min(begin + self.width, length)
            masks = int(np.count_nonzero(self.open[place, begin:stop]))
            before, count, total = int(self._masks_before[place]), int(self._masks[place]), self.options.steps
            self.block_start[place], self.block_stop[place] = begin, stop
            self.block_masks[place], self.block_step[place] = masks, 0
            self.block_steps[place] = masks if total is None else steps_of_block(total, before, before + masks, count)
            self.follows[place] &= begin == at
            due = self.block_index[place] % self.options.refresh_every == 0
            self.refresh[place] = due or not self.follows[place]
        elif self._grows(place):
            self._extend(place, self.width)
            self._enter(place, length)
        else:
            self.finish(place)

    def _ends(self, place: int) -> bool:
        """Whether an end-of-text ends this canvas; in a filled one it is a token like others."""
        return not self.request_of(place).fill

    def _grows(self, place: int) -> bool:
        unlimited = self.options.gen_length is None and self._ends(place)
        return unlimited and int(self.length[place]) < self.settings.max_length

    def _extend(self, place: int, count: int) -> None:
        """Append masks, or the ids that are forced there."""
        first = int(self.length[place])
        stop = min(first + count, self.settings.max_length)
        # A canvas that outgrows its slots moves to other ones: a rule of its own length, not of the batch.
        if self.slots(stop) > self.slots(first):
            self.follows[place] = False
        self._reserve(stop)
        self.length[place] = stop
        self.ids[place, first:stop] = self.settings.mask_id
        self.open[place, first:stop] = True
        for position, token in self.request_of(place).forced.items():
            if first <= (column := int(self.start[place]) + position) < stop:
                self.ids[place, column] = token
                self.open[place, column] = False

    def _reserve(self, length: int) -> None:
        """Columns for a canvas of `length` and any window in it."""
        more = self.slots(length) - self.ids.shape[1]
        if more > 0:
            wider = ((0, 0), (0, more))
            self.ids = np.pad(self.ids, wider, constant_values=self.settings.pad_id)
            self.open, self.given = np.pad(self.open, wider), np.pad(self.given, wider)
            self.step_map, self.logprobs = np.pad(self.step_map, wider), np.pad(self.logprobs, wider)

    def _renew_live(self) -> None:
        self.live = np.array([place for place, each in enumerate(self.requests) if each is not None], dtype=np.int64)
