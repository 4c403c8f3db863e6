"""Inputs for sessions: noised problems with their targets, and random canvases of every shape.

Shape letters: B batch, Q query rows, R head rows, V vocabulary rows.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from pipeline.backends.backend import Feeds
from pipeline.calibration.states import States
from pipeline.runner.eos import BANNED
from pipeline.runner.loop import logit_bias
from pipeline.runner.settings import Settings

SWEEP_BATCHES = (1, 3)
SWEEP_LENGTHS = (1, 2, 7, 33, 128)
SWEEP_NOISE = (0.0, 0.5, 1.0)
# A banned logit is the bias with at most a few digits of its own left: there is nothing to compare.
BANNED_BELOW = BANNED / 10


@dataclass(frozen=True, kw_only=True)
class Scored:
    """One batch, the id that belongs at each head row, and which head rows count."""

    feeds: Feeds
    targets: npt.NDArray[np.int64]  # [B, R]
    counts: npt.NDArray[np.bool_]  # [B, R]


def is_banned(logits: npt.NDArray[np.floating]) -> npt.NDArray[np.bool_]:
    """Which logits are those of ids that can never be meant; never NaN."""
    banned: npt.NDArray[np.bool_] = logits <= BANNED_BELOW
    return banned


def unbanned(settings: Settings) -> int:
    """How many ids can be meant."""
    return int(np.count_nonzero(logit_bias(settings) == 0))


def feeds_of(settings: Settings, ids: torch.Tensor, kv_len: torch.Tensor, head_index: torch.Tensor) -> Feeds:
    """A full pass over `ids` [B, Q]."""
    batch, query = ids.shape
    return Feeds(
        input_ids=ids.numpy(),
        position_ids=np.broadcast_to(np.arange(query), (batch, query)).copy(),
        kv_len=kv_len.numpy(),
        head_index=head_index.numpy(),
        logit_bias=logit_bias(settings),
        inv_temp=np.ones(batch, np.float32),
    )


def scored_batches(settings: Settings, states: States, size: int) -> Iterator[Scored]:
    """Every masked position of the canvases; Dream's row is one to the left of what it predicts."""
    for batch in states.batches(size):
        counts = batch.masked.sum(1)
        rows = int(counts.max())
        # Masked positions first, in order; rows past a sample's count repeat other positions and do not count.
        position = torch.sort(~batch.masked, dim=1, stable=True).indices[:, :rows]
        head = (position - int(settings.shifted_logits)).clamp_min(0)
        yield Scored(
            feeds=feeds_of(settings, batch.input_ids, batch.kv_len, head.contiguous()),
            targets=batch.clean_ids.gather(1, position).numpy(),
            counts=(torch.arange(rows)[None, :] < counts[:, None]).numpy(),
        )


def sweep(settings: Settings, seed: int) -> Iterator[Feeds]:
    """Random ids in batches of 1 and 3, lengths 1 to 128 (or the model's limit), masked shares 0 to 1, ragged rows."""
    draw = torch.Generator().manual_seed(seed)
    for batch in SWEEP_BATCHES:
        for length in sorted({min(n, settings.max_length) for n in SWEEP_LENGTHS}):
            for noise in SWEEP_NOISE:
                ids = torch.randint(settings.vocab_size, (batch, length), generator=draw)
                ids = ids.masked_fill(torch.rand(batch, length, generator=draw) < noise, settings.mask_id)
                kv_len = torch.randint(1, length + 1, (batch,), generator=draw)
                kv_len[0] = length
                rows = torch.arange(length).expand(batch, length).minimum(kv_len[:, None] - 1)
                yield feeds_of(settings, ids, kv_len, rows.contiguous())
