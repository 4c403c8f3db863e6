"""How likely an answer is after its prompt, by masks drawn at every share of it.

    -log2 p(answer | prompt) <= E over k ~ U(1..L) and k masked positions of  L / k * (bits of the masked tokens)

estimated on masks stratified over k, as LLaDA's evaluation does (arXiv 2502.09992, eq. 6): sample i of n masks
1 + (k + floor(i L / n)) mod L positions, k drawn once. Answers of equal length see equal masks, so what two of them
share cancels. The end-of-text behind an answer is visible and not scored.
Shape letters: B batch, Q query rows, R head rows, V vocabulary rows.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from pipeline.backends.backend import Feeds, Floats, Ids
from pipeline.backends.guided import paired
from pipeline.backends.score import ScoreSession
from pipeline.errors import InputRefused, UsageFault, ValidationFailed
from pipeline.runner.loop import logit_bias
from pipeline.runner.settings import Settings
from pipeline.runner.window import aligned

HEAD_ROWS = 64  # masked positions of one canvas that a pass looks at; more of them take a pass more
LOGITS_A_PASS = 1 << 24  # B * R * V at most: the graph holds them several times over in float64


@dataclass(frozen=True, kw_only=True)
class Score:
    """`bits` bound -log2 p(answer | prompt) on average over the masks; `nfe` canvases went through the model."""

    bits: float
    tokens: int
    samples: int
    nfe: int

    @property
    def bits_per_token(self) -> float:
        """Mean over the tokens of the answer."""
        return self.bits / self.tokens


@dataclass(frozen=True)
class Piece:
    """One canvas of a pass: the positions `asked` of a sample, of all that are `masked` in it."""

    sample: int
    masked: tuple[int, ...]
    asked: tuple[int, ...]


def score(
    session: ScoreSession,
    settings: Settings,
    prompt: Sequence[int],
    answer: Sequence[int],
    *,
    samples: int = 128,
    seed: int = 0,
    batch_size: int = 32,
    guidance: float = 0.0,
) -> Score:
    """Score the ids of an answer; the draws depend on (seed, length of the answer) alone.

    With `guidance` its tokens have the probabilities of guided logits, and a canvas goes through the model twice.
    Raises UsageFault for an empty answer, a mask id, too long a text or no samples, InputRefused for an unknown id.
    """
    if samples < 1 or batch_size < 1:
        raise UsageFault(f"samples is {samples} and batch_size {batch_size}; expected 1 or more of each")
    if not 0.0 <= guidance < math.inf:
        raise UsageFault(f"guidance is {guidance}; expected 0 or more")
    ids = scored_canvas(prompt, answer, settings)
    length = len(answer)
    masks = [
        tuple(len(prompt) + place for place in mask)
        for mask in stratified_masks(length, samples, random.Random(f"{seed}/{length}"))
    ]
    bits = np.zeros(samples)
    nfe, passes = 0, 2 if guidance > 0 else 1  # of a canvas: with its prompt, and without
    for batch in batches(masks, settings.embedding_size * passes, batch_size):
        feeds, targets = batch_feeds(ids, batch, settings)
        if guidance > 0:
            log_p = guided_log_probabilities(session, guided(feeds, len(prompt), guidance, settings.mask_id), targets)
        else:
            log_p = session.log_probabilities(feeds, targets).astype(np.float64)
        nfe += len(batch) * passes
        for piece, row in zip(batch, log_p, strict=True):
            bits[piece.sample] -= row[: len(piece.asked)].sum() / math.log(2)
    if not np.isfinite(bits).all():
        raise ValidationFailed("the model produced NaN or infinite logits; its bundle cannot be trusted")
    shares = np.array([len(mask) / length for mask in masks])
    return Score(bits=float((bits / shares).mean()), tokens=length, samples=samples, nfe=nfe)


def stratified_masks(length: int, samples: int, draw: random.Random) -> Iterator[list[int]]:
    """Masked places among `length`: their number runs evenly through 1..length from a drawn start."""
    start = draw.randrange(length)
    for number in range(samples):
        yield draw.sample(range(length), 1 + (start + number * length // samples) % length)


def scored_canvas(prompt: Sequence[int], answer: Sequence[int], settings: Settings) -> Ids:
    """Prompt, answer, end-of-text; raises UsageFault and InputRefused as `score` does."""
    if not len(answer):
        raise UsageFault("the answer has no tokens; expected at least one to score")
    ids = np.array([*prompt, *answer, settings.eos_id], dtype=np.int64)
    if len(ids) > settings.max_length:
        raise UsageFault(
            f"prompt and answer have {len(prompt)} and {len(answer)} tokens, {len(ids)} with the end-of-text; the "
            f"model takes {settings.max_length}. Shorten one of them"
        )
    if (wrong := ids[(ids < 0) | (ids >= settings.embedding_size)]).size:
        raise InputRefused(
            f"the tokenizer made id {wrong[0]}; the model's embedding has rows 0 to {settings.embedding_size - 1}"
        )
    if settings.mask_id in ids:
        raise UsageFault(
            f"the text holds the mask (id {settings.mask_id}), which has no likelihood; score text without masks"
        )
    return ids


def batches(masks: Sequence[tuple[int, ...]], vocabulary: int, batch_size: int) -> Iterator[list[Piece]]:
    """The samples in pieces of at most HEAD_ROWS positions, and as many pieces at a time as memory is meant for."""
    pieces = [
        Piece(sample, mask, mask[first : first + HEAD_ROWS])
        for sample, mask in enumerate(masks)
        for first in range(0, len(mask), HEAD_ROWS)
    ]
    rows = max(len(piece.asked) for piece in pieces)
    size = max(1, min(batch_size, LOGITS_A_PASS // (rows * vocabulary)))
    yield from (pieces[first : first + size] for first in range(0, len(pieces), size))


def batch_feeds(ids: Ids, pieces: Sequence[Piece], settings: Settings) -> tuple[Feeds, Ids]:
    """Inputs of a full pass over a canvas a piece, and the id that belongs at each head row [B, R]."""
    length, batch = len(ids), len(pieces)
    canvas = np.full((batch, aligned(length)), settings.pad_id, dtype=np.int64)
    canvas[:, :length] = ids
    rows = max(len(piece.asked) for piece in pieces)
    # Rows past a piece's own repeat its last position; nobody counts them.
    positions = np.array([[*piece.asked, *piece.asked[-1:] * (rows - len(piece.asked))] for piece in pieces])
    for row, piece in zip(canvas, pieces, strict=True):
        row[list(piece.masked)] = settings.mask_id
    feeds = Feeds(
        input_ids=canvas,
        position_ids=np.tile(np.arange(canvas.shape[1], dtype=np.int64), (batch, 1)),
        kv_len=np.full(batch, length, dtype=np.int64),
        head_index=np.maximum(positions - settings.shifted_logits, 0),
        logit_bias=logit_bias(settings),
        inv_temp=np.ones(batch, dtype=np.float32),
    )
    return feeds, ids[positions]


def guided(feeds: Feeds, prompt: int, strength: float, mask_id: int) -> Feeds:
    """The same canvases, guided, where their first `prompt` ids are the prompt."""
    promptless = feeds.input_ids.copy()
    promptless[:, :prompt] = mask_id
    return replace(feeds, guidance=np.full(len(promptless), strength, np.float32), promptless_ids=promptless)


def guided_logits(session: ScoreSession, feeds: Feeds) -> Floats:
    """Biased logits [B, R, V] of guided feeds: c + s (c - u), c with the prompt and u without."""
    assert feeds.guidance is not None
    # The bias comes last: a ban is so large that a difference of two banned logits is noise.
    pairs = session.logits(replace(paired(feeds), logit_bias=np.zeros_like(feeds.logit_bias), guidance=None))
    with_prompt, without = pairs[0::2], pairs[1::2]
    combined: Floats = with_prompt + feeds.guidance[:, None, None] * (with_prompt - without) + feeds.logit_bias
    return combined


def guided_log_probabilities(session: ScoreSession, feeds: Feeds, target_ids: Ids) -> npt.NDArray[np.float64]:
    """ln p [B, R] of an id at each head row under guided logits."""
    logits = guided_logits(session, feeds).astype(np.float64)
    best = logits.max(axis=-1)
    total = best + np.log(np.exp(logits - best[..., None]).sum(axis=-1))
    chosen: npt.NDArray[np.float64] = np.take_along_axis(logits, target_ids[..., None], axis=-1)[..., 0] - total
    return chosen


def row_logits(session: ScoreSession, feeds: Feeds, row: int, head_row: int) -> Floats:
    """Biased logits [V] of one head row of a full pass, for draws that its record does not hold; guided if it is."""
    one = slice(row, row + 1)
    strength, promptless = feeds.guidance, feeds.promptless_ids
    alone = replace(
        feeds,
        input_ids=feeds.input_ids[one],
        position_ids=feeds.position_ids[one],
        kv_len=feeds.kv_len[one],
        head_index=feeds.head_index[one, head_row : head_row + 1],
        inv_temp=feeds.inv_temp[one],
        guidance=None if strength is None else strength[one],
        promptless_ids=None if promptless is None else promptless[one],
    )
    logits: Floats = (session.logits(alone) if strength is None else guided_logits(session, alone))[0, 0]
    return logits
