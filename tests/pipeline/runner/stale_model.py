"""A made-up model in whole numbers whose passes depend on stale values exactly as a transformer's do.

Two layers keep a number a slot: the first the id that stands there, the second a mixture of the id and of all first
numbers at the time it was written. A prediction mixes its own second number with those of all slots, so a pass over a
window gives something else than a pass over the canvas unless nothing outside the window is stale.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from pipeline.backends.backend import Feeds, Ids, Record
from pipeline.runner import GenerateOptions, Settings
from pipeline.runner.window import Window

PRIME = 1_000_003
LETTERS, EOS, MASK, PAD = 40, 40, 41, 42
SETTINGS = Settings(
    mask_id=MASK,
    eos_id=EOS,
    pad_id=PAD,
    shifted_logits=False,
    max_length=200,
    vocab_size=44,
    embedding_size=44,
    top_k=2,
)


def first_sum(ids: Ids) -> int:
    """What the second layer sees of the first: ids [L]."""
    return int((ids * np.arange(1, len(ids) + 1)).sum() % PRIME)


def second(ids: Ids, positions: Ids, seen: int) -> Ids:
    """Second numbers of these ids at these positions."""
    return (ids * 7919 + positions * 31 + seen * 104_729) % PRIME


def predict(own: Ids, everything: int, often: int) -> tuple[Ids, np.ndarray]:
    """Best id and tail of rows with these second numbers; one in `often` is an end-of-text."""
    state = (own * 613 + everything * 17) % PRIME
    ids = np.where(state // 7 % often == 0, EOS, state % LETTERS)
    return ids, (state // 11 % 997 + 1) / 997


@dataclass(eq=False)
class Kept:
    """Both numbers of every slot [batch, slots]."""

    batch: int
    slots: int

    def __post_init__(self) -> None:
        self.first, self.second = np.zeros((2, self.batch, self.slots), dtype=np.int64)

    @property
    def size_bytes(self) -> int:
        return self.first.nbytes * 2


@dataclass(frozen=True)
class Call:
    """What one pass was asked."""

    feeds: Feeds
    cache: Kept | None
    first_row: int

    @property
    def full(self) -> bool:
        return self.feeds.write_start is None


class StaleModel:
    """The session; `calls` has every pass, `allocated` every cache."""

    top_k = 2
    guided = False

    def __init__(self, *, cached: bool = True, often: int = 60) -> None:
        self.cached, self.often = cached, often
        self.calls: list[Call] = []
        self.allocated: list[Kept] = []

    def allocate(self, batch: int, slots: int) -> Kept:
        assert self.cached
        assert slots % 16 == 0
        self.allocated.append(Kept(batch, slots))
        return self.allocated[-1]

    def run(self, feeds: Feeds, cache: Kept | None = None, *, first_row: int = 0) -> Record:
        self.calls.append(Call(feeds, cache, first_row))
        batch, query = feeds.input_ids.shape
        kept = cache or Kept(batch, query)
        start = np.zeros(batch, np.int64) if feeds.write_start is None else feeds.write_start
        assert query % 16 == 0
        assert 0 <= first_row <= first_row + batch <= kept.batch
        assert (start >= 0).all() and (start + query <= kept.slots).all()
        assert ((feeds.head_index >= 0) & (feeds.head_index < query)).all()
        assert (feeds.position_ids == start[:, None] + np.arange(query)).all()
        best, tail = np.zeros(feeds.head_index.shape, np.int64), np.zeros(feeds.head_index.shape)
        for b in range(batch):
            window, length = slice(start[b], start[b] + query), feeds.kv_len[b]
            firsts, seconds = kept.first[first_row + b], kept.second[first_row + b]
            firsts[window] = feeds.input_ids[b]
            seconds[window] = second(feeds.input_ids[b], feeds.position_ids[b], first_sum(firsts[:length]))
            own = seconds[window][feeds.head_index[b]]
            best[b], tail[b] = predict(own, int(seconds[:length].sum() % PRIME), self.often)
        return record_of(best, tail)

    def close(self) -> None:
        pass


def record_of(best: Ids, tail: np.ndarray) -> Record:
    """A record with a second best id that nothing looks at."""
    zeros = np.zeros(tail.shape, np.float32)
    return Record(
        top_ids=np.stack([best, (best + 1) % LETTERS], axis=-1),
        top_logits=np.stack([zeros, zeros - 50], axis=-1),
        tail=tail.astype(np.float32),
        neg_entropy=zeros,
        lse_t=zeros,
    )


@dataclass(frozen=True)
class Plain:
    """What decoding one text by hand gives."""

    region: list[int]
    nfe_full: int
    nfe_block: int


def decode(
    prompt: list[int], options: GenerateOptions, *, shift: int = 0, often: int = 60, fill: bool = False
) -> Plain:
    """Dual cache by hand for one text: a full pass where a block begins, else the window; policies threshold and quota.

    Fast-dLLM (arXiv 2505.22618), section 3.2; the rows that fill the window up to a multiple of 16 are computed, too. A
    block that begins without a full pass takes the block before it along; a canvas that outgrows its slots begins anew,
    and so does a block that leaves a gap to the one before.
    """
    grows, origin = options.gen_length is None and not fill, 0 if fill else len(prompt)
    width = min(options.block_length, options.gen_length or options.block_length)
    ids = np.array(prompt if fill else [*prompt, *[MASK] * (options.gen_length or width)])
    firsts = seconds = np.zeros(0, np.int64)
    passes = {True: 0, False: 0}
    left, right = options.vicinity
    start, index, moves = origin, 0, False
    slots = Window.of(replace(SETTINGS, shifted_logits=bool(shift)), options, behind=width).slots
    while True:
        given = int((ids[start:] == MASK).argmax())
        start, moves = start + given, moves or given > 0
        stop, step = min(start + width, len(ids)), 0
        while (ids[start:stop] == MASK).any():
            full = options.exact or (step == 0 and (moves or index % options.refresh_every == 0))
            before = left + shift + (width if step == 0 else 0)
            rows = -(-(before + width + right) // 16) * 16
            low = 0 if full else max(start - before, 0)
            high = len(ids) if full else min(low + rows, len(ids))
            firsts, seconds = (np.pad(kept, (0, len(ids) - len(kept))) for kept in (firsts, seconds))
            firsts[low:high] = ids[low:high]
            seconds[low:high] = second(ids[low:high], np.arange(low, high), first_sum(firsts))
            places = np.arange(start, stop)
            best, tail = predict(seconds[np.maximum(places - shift, 0)], int(seconds.sum() % PRIME), often)
            masked = np.flatnonzero(ids[start:stop] == MASK)
            sure = [j for j in masked if 1 / (1 + np.float64(np.float32(tail[j]))) >= options.threshold]
            owed = sorted(masked, key=lambda j: (np.float32(tail[j]), j))[:1]
            for j in {*owed, *(sure if options.policy == "threshold" else ())}:
                ids[start + j] = best[j]
            passes[full], step = passes[full] + 1, step + 1
            region = ids[origin:].tolist()
            if not fill and EOS in region and MASK not in region[: region.index(EOS)]:
                return Plain([EOS if i == MASK else i for i in region], passes[True], passes[False])
        start, index, moves = stop, index + 1, False
        if MASK not in ids[start:]:
            if not grows or len(ids) == SETTINGS.max_length:
                return Plain(ids[origin:].tolist(), passes[True], passes[False])
            before = len(ids)
            ids = np.concatenate([ids, np.full(min(width, SETTINGS.max_length - len(ids)), MASK)])
            moves = slots(len(ids)) > slots(before)
