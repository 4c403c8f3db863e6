"""One proposed token a head row, from the top-K record, and how sure the model is of it.

Sampling follows the whole softmax though only K logits are here: draw u and walk down the distribution, best token
first. Its total is known (`lse_t`), so a u inside the top-K decides; the rare u beyond it asks `row_logits` for that
one row. Shape letters: B batch, R head rows, K top-K, V vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.backends.backend import Floats, Ids, Record
from pipeline.runner.candidates import Picks, Scores
from pipeline.runner.draws import uniform_rows

# (row of the batch, head row) -> logits [V] of that row, biased as the record's are, before the temperature.
RowLogits = Callable[[int, int], Floats]

TOKEN, PLACE, AGAIN = range(3)  # what the draws of one position are for: its token, the policy, a second try
UNKNOWN = -1  # no id; an end-of-text that is waited for must not be mistaken for it
FARTHEST = 600.0  # e^600 is still finite


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """One token a head row and the scores of it that policies look at, all [B, R]."""

    ids: Ids
    doubt: Scores  # 1/p - 1; p clean, or under temperature and top_p where `warm` was asked for
    neg_entropy: Scores  # sum p ln p, of the same law
    margin: Scores  # p of the best token minus p of the second, of the same law
    log_probability: Scores  # ln p, always clean
    unknown: Picks  # the token lies beyond the top-K and was not looked up: its id is -1, its p that of the K-th


def keyed_draws(
    *, seed: int, requests: Sequence[int], steps: Sequence[int], starts: Sequence[int], rows: int
) -> Scores:
    """Uniform draws [B, rows, 3] in (0, 1): TOKEN, PLACE and AGAIN of the canvas positions from starts[b] on."""
    return uniform_rows(seed=seed, requests=requests, steps=steps, starts=starts, rows=rows, columns=3)


def beyond_top(record: Record, behind: Scores, weight: Scores, inverse: float) -> Scores:
    """Weight of all tokens beyond the top-K at temperature 1 / inverse, the best token's being 1 [B, R].

    behind [B, R, K] the best logit minus each; weight [B, R, K] = e^(-behind * inverse).
    """
    if inverse == 1.0:
        return np.asarray(np.maximum(record.tail - weight[..., 1:].sum(axis=-1), 0.0))
    best = record.top_logits[..., 0].astype(np.float64) * inverse
    whole = np.exp(np.minimum(record.lse_t - best, FARTHEST))
    rest: Scores = np.maximum(whole - weight.sum(axis=-1), 0.0)
    if inverse > 1.0:
        # Cold, lse_t is so large that its rounding hides the rest; but no token beyond is likelier than the K-th.
        clean = np.maximum(record.tail - np.exp(-behind[..., 1:]).sum(axis=-1), 0.0)
        rest = np.minimum(rest, clean * np.exp(-behind[..., -1] * (inverse - 1.0)))
    return rest


def inverse_of(temperature: float) -> float:
    """What the graph multiplied logits by for `lse_t`: float32 there, and 1 where nothing is drawn."""
    return float(np.float32(1.0 / temperature)) if temperature > 0 else 1.0


def propose(
    record: Record,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    warm: bool = False,
    draws: Scores | None = None,
    row_logits: RowLogits | None = None,
    wanted: Picks | None = None,
) -> Proposal:
    """The best token of each row (temperature 0) or a drawn one; `warm` scores it as Dream's policies do.

    `draws` [B, R, 3] of `keyed_draws` are needed above temperature 0, and the record's `lse_t` must be of that
    temperature. Without `row_logits` tokens are drawn from the top-K alone, renormalised; with it, tokens beyond are
    looked up in the `wanted` [B, R] head rows (None: all), and are `unknown` in the others.
    """
    tail = record.tail.astype(np.float64)
    logits = record.top_logits.astype(np.float64)
    behind = logits[..., 0, None] - logits
    if temperature == 0 and not warm:
        return Proposal(
            ids=record.top_ids[..., 0],
            doubt=tail,
            neg_entropy=record.neg_entropy.astype(np.float64),
            margin=_margin(behind, tail),
            log_probability=-np.log1p(tail),
            unknown=np.zeros(tail.shape, dtype=bool),
        )
    clean = inverse_of(temperature) == 1.0 and top_p >= 1.0
    law = _Law.of(record, behind, temperature, top_p)
    ids, chosen, unknown = record.top_ids[..., 0], np.zeros_like(tail), np.zeros(tail.shape, dtype=bool)
    if temperature > 0:
        if draws is None:
            raise ValueError(f"temperature is {temperature}; expected draws to sample with")
        ids, chosen, unknown = _draw(law, record, behind, draws, top_p, row_logits, wanted)
    # (1 + tail) e^chosen - 1, written so that the argmax keeps its tail to the last bit.
    doubt = tail + (1.0 + tail) * np.expm1(np.minimum(chosen, FARTHEST))
    return Proposal(
        ids=ids,
        doubt=law.doubt(chosen) if warm else doubt,
        neg_entropy=law.neg_entropy() if warm and not clean else record.neg_entropy.astype(np.float64),
        margin=law.margin() if warm else _margin(behind, tail),
        log_probability=-np.log1p(doubt),
        unknown=unknown,
    )


def settle(proposing: Callable[[Picks], Proposal], picking: Callable[[Proposal], Picks]) -> tuple[Proposal, Picks]:
    """Proposal and picks of a step in which whole rows are asked for where they are picked, and nowhere else.

    `proposing` looks up the rows it is given, `picking` asks a policy. A token beyond the top-K is no likelier than the
    K-th, in whose name it stands until it is picked; so it is picked too early at most, and then looked up.
    """
    proposal = proposing(np.zeros((1, 1), dtype=bool))
    wanted = np.zeros_like(proposal.unknown)
    while True:
        picks = picking(proposal)
        missing = picks & proposal.unknown
        if not missing.any():
            return proposal, picks
        wanted |= missing
        proposal = proposing(wanted)


def _margin(behind: Scores, tail: Scores) -> Scores:
    # With one logit a row the second is unknown: it is at most the whole tail, and at most the best.
    second = np.exp(-behind[..., 1]) if behind.shape[-1] > 1 else np.minimum(tail, 1.0)
    return np.asarray((1.0 - second) / (1.0 + tail))


@dataclass(frozen=True, kw_only=True)
class _Law:
    """What tokens are drawn from, relative to the best token's weight 1."""

    inverse: float  # of the temperature
    weight: Scores  # [B, R, K]
    rest: Scores  # [B, R] weight of all tokens beyond the top-K
    kept: npt.NDArray[np.bool_]  # [B, R, K] the tokens of the top-K inside the nucleus
    closed: Picks  # [B, R] the nucleus ends inside the top-K
    outside: Scores  # [B, R] weight of what is kept beyond the top-K; a bound where top_p ends there

    @classmethod
    def of(cls, record: Record, behind: Scores, temperature: float, top_p: float) -> _Law:
        inverse = inverse_of(temperature)
        weight = np.exp(-behind * inverse)
        rest = beyond_top(record, behind, weight, inverse)
        if top_p >= 1.0:
            kept, closed = np.ones(weight.shape, dtype=bool), np.zeros(rest.shape, dtype=bool)
            return cls(inverse=inverse, weight=weight, rest=rest, kept=kept, closed=closed, outside=rest)
        total = weight.sum(axis=-1) + rest
        upto = np.cumsum(weight, axis=-1)
        kept = upto - weight <= top_p * total[..., None]
        closed = upto[..., -1] > top_p * total
        outside = np.where(closed, 0.0, np.minimum(np.maximum(top_p * total - upto[..., -1], 0.0), rest))
        return cls(inverse=inverse, weight=weight, rest=rest, kept=kept, closed=closed, outside=outside)

    @property
    def norm(self) -> Scores:
        return np.asarray((self.weight * self.kept).sum(axis=-1) + self.outside)

    def doubt(self, chosen: Scores) -> Scores:
        """1/p - 1 of the token `chosen` logits behind the best one [B, R]."""
        tail = (self.weight * self.kept)[..., 1:].sum(axis=-1) + self.outside
        return np.asarray(tail + (1.0 + tail) * np.expm1(np.minimum(chosen * self.inverse, FARTHEST)))

    def neg_entropy(self) -> Scores:
        """Sum of p ln p, what lies beyond the top-K counted as one token [B, R]."""
        share = np.concatenate([self.weight * self.kept, self.outside[..., None]], axis=-1) / self.norm[..., None]
        return np.asarray((share * np.log(np.maximum(share, np.finfo(np.float64).tiny))).sum(axis=-1))

    def margin(self) -> Scores:
        if self.weight.shape[-1] == 1:
            return np.asarray((1.0 - np.minimum(self.outside, 1.0)) / self.norm)
        return np.asarray((1.0 - self.weight[..., 1] * self.kept[..., 1]) / self.norm)


def _draw(
    law: _Law,
    record: Record,
    behind: Scores,
    draws: Scores,
    top_p: float,
    row_logits: RowLogits | None,
    wanted: Picks | None,
) -> tuple[Ids, Scores, Picks]:
    """Drawn ids [B, R], how far their logits lie behind the best one's, and where they are unknown."""
    K = behind.shape[-1]
    inside = (law.weight * law.kept).sum(axis=-1)
    whole = inside if row_logits is None else inside + np.where(law.closed, 0.0, law.rest)
    spent = np.cumsum(law.weight * law.kept, axis=-1)
    rank = (spent <= (draws[..., TOKEN] * whole)[..., None]).sum(axis=-1)
    within = np.minimum(rank, law.kept.sum(axis=-1) - 1)[..., None]
    ids = np.take_along_axis(record.top_ids, within, axis=-1)[..., 0]
    chosen = np.take_along_axis(behind, within, axis=-1)[..., 0]
    unknown = np.zeros(ids.shape, dtype=bool)
    if row_logits is not None:
        beyond = (rank == K) & ~law.closed & (law.rest > 0)
        known = beyond if wanted is None else beyond & wanted
        unknown = beyond & ~known
        ids[unknown] = UNKNOWN
        for b, r in np.argwhere(known):
            logits = row_logits(int(b), int(r)).astype(np.float64)
            ids[b, r] = _draw_row(logits * law.inverse, draws[b, r], top_p)
            chosen[b, r] = logits.max() - logits[ids[b, r]]
    return ids, chosen, unknown


def _draw_row(logits: Scores, draws: Scores, top_p: float) -> int:
    """An id drawn from the softmax of [V] logits; a first draw outside the nucleus is drawn again inside it."""
    order = np.argsort(-logits, kind="stable")
    spent = np.cumsum(np.exp(logits[order] - logits[order[0]]))
    # The law stays exact: a rejected first draw leaves all of the nucleus in proportion.
    at = int(np.searchsorted(spent, draws[TOKEN] * spent[-1], side="right"))
    if top_p < 1.0:
        last = int(np.searchsorted(spent, top_p * spent[-1], side="right"))
        if at > last:
            at = int(np.searchsorted(spent, draws[AGAIN] * spent[last], side="right"))
    return int(order[min(at, len(order) - 1)])
