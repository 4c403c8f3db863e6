"""Which rows of a canvas a pass computes, and the arrays that say so.

Slot = canvas position. A block pass computes the block, `vicinity` rows to either side of it, for a model with shifted
logits the row before it (which predicts its first position), and what fills the window up to a multiple of ALIGN:
real rows all of them, so the window depends on the options and the row alone, never on the batch. Where a block begins
without a full pass, the window of its first pass has the block before it, too, whose last ids no pass has seen yet.
Shape letters: B batch, Q query rows, R head rows, S cache slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline.backends.backend import Feeds, Floats, Ids
from pipeline.runner.settings import GenerateOptions, Settings

ALIGN = 16  # Q and S are multiples of it: few shapes, and sums over slots end in no partial vector


def aligned(count: int) -> int:
    """The next multiple of ALIGN."""
    return -(-count // ALIGN) * ALIGN


def bucket(slots: int) -> int:
    """Slots to allocate for that many: four sizes to each doubling, at most a quarter too many or ALIGN."""
    grain = max(ALIGN, (1 << (slots - 1).bit_length()) >> 3)
    return -(-slots // grain) * grain


def block_width(settings: Settings, options: GenerateOptions) -> int:
    """R: head rows of every pass under these options."""
    return min(options.block_length, options.gen_length or settings.max_length)


@dataclass(frozen=True, kw_only=True)
class Window:
    """Rows that a block pass computes: `before` the block's first position, `rows` in all."""

    before: int
    rows: int
    shift: int  # head row of position j is j - shift

    @classmethod
    def of(cls, settings: Settings, options: GenerateOptions, *, behind: int = 0) -> Window:
        """The window of block passes under these options, `behind` rows longer to the left."""
        left, right = options.vicinity
        shift = int(settings.shifted_logits)
        before = left + shift + behind
        return cls(before=before, rows=aligned(before + block_width(settings, options) + right), shift=shift)

    def start(self, block_start: Ids) -> Ids:
        """First row of the window [B]."""
        return np.maximum(block_start - self.before, 0)

    def slots(self, length: int) -> int:
        """Slots that let the window of a canvas of `length` stand anywhere in it."""
        return bucket(aligned(length) + min(self.rows, aligned(length)))


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What a pass must know of the canvases it computes; `promptless` are their ids without prompt, when guided."""

    ids: Ids  # [B, at least Q + the last window's start] padding behind each canvas
    lengths: Ids  # [B]
    positions: Ids  # [B, R] canvas positions to predict
    promptless: Ids | None = None  # as ids


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What a whole generation has in common: the law's bias [V], and a temperature and a guidance for every row."""

    bias: Floats
    inverse: np.float32  # of the temperature
    guidance: np.float32

    @classmethod
    def of(cls, options: GenerateOptions, bias: Floats) -> Terms:
        """Under these options."""
        inverse = 1.0 / options.temperature if options.temperature > 0 else 1.0
        return cls(bias=bias, inverse=np.float32(inverse), guidance=np.float32(options.guidance))

    @property
    def guided(self) -> bool:
        return bool(self.guidance > 0)


def full_feeds(rows: Rows, shift: int, terms: Terms) -> Feeds:
    """The inputs of a pass over whole canvases."""
    batch, count = len(rows.ids), aligned(int(rows.lengths.max()))
    return Feeds(
        input_ids=np.ascontiguousarray(rows.ids[:, :count]),
        position_ids=np.tile(np.arange(count, dtype=np.int64), (batch, 1)),
        kv_len=rows.lengths,
        head_index=np.maximum(rows.positions - shift, 0),
        logit_bias=terms.bias,
        inv_temp=np.full(batch, terms.inverse),
        guidance=np.full(batch, terms.guidance) if terms.guided else None,
        promptless_ids=None if rows.promptless is None else rows.promptless[:, :count],
    )


def block_feeds(rows: Rows, window: Window, starts: Ids, terms: Terms) -> Feeds:
    """The inputs of a pass over the windows that begin at `starts` [B]."""
    batch, count = len(rows.ids), min(window.rows, aligned(int(rows.lengths.max())))
    each, slots = np.arange(batch)[:, None], starts[:, None] + np.arange(count, dtype=np.int64)
    return Feeds(
        input_ids=rows.ids[each, slots],
        position_ids=slots,
        kv_len=rows.lengths,
        head_index=np.maximum(rows.positions - window.shift, 0) - starts[:, None],
        logit_bias=terms.bias,
        inv_temp=np.full(batch, terms.inverse),
        write_start=starts,
        guidance=np.full(batch, terms.guidance) if terms.guided else None,
        promptless_ids=None if rows.promptless is None else rows.promptless[each, slots],
    )
