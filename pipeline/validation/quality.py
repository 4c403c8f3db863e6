"""Masked NLL and agreement of one session against another, on the same canvases, from their records alone.

Shape letters: B batch, R head rows, K top-K, V vocabulary rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.backends.backend import Record, Session
from pipeline.validation.feeds import Scored

SMALLEST = 1e-12


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Means over masked positions; NLL in nats."""

    tokens: int
    reference_nll: float
    nll: float
    agreement: float

    @property
    def nll_increase(self) -> float:
        return self.nll - self.reference_nll


def masked_nll(record: Record, targets: npt.NDArray[np.int64], unbanned: int) -> npt.NDArray[np.float64]:
    """-ln p of each target [B, R]; one outside the top K gets an even share of the mass that the top K leave.

    `unbanned` ids can be meant, so as many but K share it.
    """
    logits = record.top_logits.astype(np.float64)
    log_total = logits[..., :1] + np.log1p(record.tail.astype(np.float64))[..., None]
    probability = np.exp(logits - log_total)
    found = record.top_ids == targets[..., None]
    inside = (probability * found).sum(-1)
    share = np.maximum(1.0 - probability.sum(-1), SMALLEST) / max(unbanned - logits.shape[-1], 1)
    nll: npt.NDArray[np.float64] = -np.log(np.maximum(np.where(found.any(-1), inside, share), SMALLEST))
    return nll


def compare(reference: Sequence[Record], candidate: Session, batches: Sequence[Scored], unbanned: int) -> Quality:
    """Run a session on every batch that has a record. Both need the same K, or their NLLs would not compare."""
    totals = np.zeros(4)
    for expected, batch in zip(reference, batches, strict=True):
        if (top_k := expected.top_ids.shape[-1]) != candidate.top_k:
            raise ValueError(f"the records keep {top_k} ids, the session {candidate.top_k}; expected the same number")
        records = [expected, candidate.run(batch.feeds)]
        nll = [masked_nll(record, batch.targets, unbanned)[batch.counts].sum() for record in records]
        same = records[0].top_ids[..., 0] == records[1].top_ids[..., 0]
        totals += [batch.counts.sum(), *nll, same[batch.counts].sum()]
    tokens, reference_nll, nll_sum, agreed = totals.tolist()
    return Quality(
        tokens=int(tokens), reference_nll=reference_nll / tokens, nll=nll_sum / tokens, agreement=agreed / tokens
    )
