"""THE denoising loop: canvases + session + policy -> results.

Rows are right-padded and independent: each has its own block, step counter and random keys, and a finished row's place
goes to the next request. Shape letters: B batch, Q query rows, R head rows (the block), K top-K.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.backends.backend import Feeds, Floats, Ids, Record, Session
from pipeline.errors import InputRefused, UsageFault, ValidationFailed
from pipeline.runner.candidates import Candidates
from pipeline.runner.canvas import Canvas, Result
from pipeline.runner.draws import gumbel
from pipeline.runner.policies import POLICIES
from pipeline.runner.settings import GenerateOptions, Settings

BANNED = np.float32(-1e9)  # finite: -inf would make p ln p of the entropy NaN
LENGTH_STEP = 16  # Q is a multiple of it: few shapes, and sums over slots end in no partial vector


@dataclass(frozen=True, kw_only=True)
class Step:
    """One row after one step, for whoever draws it."""

    request: int
    region: Ids  # the generated part, masks where nothing is committed yet
    committed: Ids  # positions in the region that this step wrote
    finished: bool


def generate(
    session: Session,
    settings: Settings,
    prompts: Sequence[Sequence[int]],
    options: GenerateOptions,
    *,
    request_ids: Sequence[int] | None = None,
    on_step: Callable[[Step], None] | None = None,
    batch_size: int = 32,
) -> list[Result]:
    """Denoise every prompt; results in the order of the prompts, each independent of what shares its batch."""
    options.check()
    if batch_size < 1:
        raise UsageFault(f"batch_size is {batch_size}; expected 1 or more")
    requests = range(len(prompts)) if request_ids is None else request_ids
    rows = [
        Canvas(checked_prompt(prompt, settings, options), request, settings, options)
        for prompt, request in zip(prompts, requests, strict=True)
    ]
    bias = logit_bias(settings)
    waiting = deque(sorted(rows, key=lambda row: len(row.ids)))  # neighbours in length share batches: little padding
    active: list[Canvas] = []
    while waiting or active:
        while waiting and len(active) < batch_size:
            active.append(waiting.popleft())
        advance(session, active, bias, options, on_step)
        active = [row for row in active if not row.finished]
    return [row.result() for row in rows]


def checked_prompt(prompt: Sequence[int], settings: Settings, options: GenerateOptions) -> list[int]:
    """The prompt as a list; raises UsageFault when the canvas is too long, InputRefused for an id out of range."""
    length = len(prompt) + options.gen_length
    if length > settings.max_length:
        raise UsageFault(
            f"the prompt has {len(prompt)} tokens and gen-length is {options.gen_length}: {length} together; "
            f"the model takes {settings.max_length}. Shorten the prompt or lower --gen-length"
        )
    ids = [int(i) for i in prompt]
    wrong = [i for i in ids if not 0 <= i < settings.embedding_size]
    if wrong:
        raise InputRefused(
            f"the tokenizer made id {wrong[0]}; the model's embedding has rows 0 to {settings.embedding_size - 1}"
        )
    return ids


def logit_bias(settings: Settings) -> Floats:
    """Bias [V] that bans the mask id and the rows of the head beyond the vocabulary."""
    bias = np.zeros(settings.embedding_size, dtype=np.float32)
    bias[settings.vocab_size :] = BANNED
    bias[settings.mask_id] = BANNED
    return bias


def advance(
    session: Session,
    rows: Sequence[Canvas],
    bias: Floats,
    options: GenerateOptions,
    on_step: Callable[[Step], None] | None,
) -> None:
    """One forward pass and one commit for every row."""
    positions = block_positions(rows, options)
    record = session.run(feeds_of(rows, positions, bias, options))
    if not (np.isfinite(record.tail).all() and np.isfinite(record.top_logits).all()):
        raise ValidationFailed("the model produced NaN or infinite logits; its bundle cannot be trusted")
    choice, doubt = propose(record, rows, options)
    masked = np.zeros(positions.shape, dtype=bool)
    for b, row in enumerate(rows):
        width = row.block[1] - row.block[0]
        masked[b, :width] = row.open[positions[b, :width]]
    picks = POLICIES[options.policy](
        Candidates(
            doubt=doubt,
            masked=masked,
            quota=np.array([row.quota for row in rows], dtype=np.int64),
            threshold=options.threshold,
        )
    )
    for b, row in enumerate(rows):
        picked = picks[b] & masked[b]
        assert picked.any(), f"policy {options.policy} committed nothing"  # the row would never end
        row.commit(positions[b, picked], choice[b, picked])
        if on_step is not None:
            written = positions[b, picked] - row.start
            on_step(
                Step(request=row.request, region=row.ids[row.start :].copy(), committed=written, finished=row.finished)
            )


def block_positions(rows: Sequence[Canvas], options: GenerateOptions) -> Ids:
    """Canvas positions of each row's block [B, R]; a block shorter than R repeats its last position."""
    width = min(options.block_length, options.gen_length)
    starts, ends = np.array([row.block for row in rows], dtype=np.int64).T
    positions: Ids = np.minimum(starts[:, None] + np.arange(width), ends[:, None] - 1)
    return positions


def feeds_of(rows: Sequence[Canvas], positions: Ids, bias: Floats, options: GenerateOptions) -> Feeds:
    """The six inputs of a full pass; a shifted model predicts position j from row j - 1 (Dream)."""
    settings = rows[0].settings
    longest = max(len(row.ids) for row in rows)
    padded = -(-longest // LENGTH_STEP) * LENGTH_STEP
    input_ids = np.full((len(rows), padded), settings.pad_id, dtype=np.int64)
    for b, row in enumerate(rows):
        input_ids[b, : len(row.ids)] = row.ids
    inverse = 1.0 / options.temperature if options.temperature > 0 else 1.0
    return Feeds(
        input_ids=input_ids,
        position_ids=np.tile(np.arange(padded, dtype=np.int64), (len(rows), 1)),
        kv_len=np.array([len(row.ids) for row in rows], dtype=np.int64),
        head_index=np.maximum(positions - 1, 0) if settings.shifted_logits else positions,
        logit_bias=bias,
        inv_temp=np.full(len(rows), inverse, dtype=np.float32),
    )


def propose(record: Record, rows: Sequence[Canvas], options: GenerateOptions) -> tuple[Ids, npt.NDArray[np.float64]]:
    """One token a head row and the doubt 1/p - 1 of it, p from the clean logits whatever the temperature [B, R]."""
    tail = record.tail.astype(np.float64)
    if options.temperature == 0:
        return record.top_ids[..., 0], tail
    logits = record.top_logits.astype(np.float64)
    _, R, K = logits.shape
    noise = np.stack(
        [
            gumbel(seed=options.seed, request=row.request, step=row.nfe, start=row.block[0], rows=R, columns=K)
            for row in rows
        ]
    )
    rank = np.argmax(logits / options.temperature + noise, axis=-1)[..., None]
    behind = logits[..., 0] - np.take_along_axis(logits, rank, axis=-1)[..., 0]
    # (1 + tail) e^behind - 1, written so that the argmax keeps its tail to the last bit.
    doubt = tail + (1.0 + tail) * np.expm1(np.minimum(behind, 600.0))
    return np.take_along_axis(record.top_ids, rank, axis=-1)[..., 0], doubt
