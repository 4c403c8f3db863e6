"""Teacher-forced agreement: does a model mean the same as another on the same canvas, position by position?

    argmax: share of masked positions whose best ids are equal
    KL = sum over the vocabulary of p log2(p / q),  p the reference's distribution, q the candidate's

Shape letters: M masked positions of a pass, V vocabulary rows.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.metrics.noise_grid import MaskedRows
from pipeline.metrics.probe import Observation
from pipeline.metrics.sums import Sums


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Both weighed by masked tokens; `kl` in bits."""

    argmax: Sums
    kl: Sums


def same_best(reference: Observation, candidate: Observation, rows: MaskedRows) -> Tensor:
    """1 where the best ids are equal, lower id first on ties, float64 [M]."""
    best = [torch.from_numpy(each.record.top_ids[..., 0])[rows.counts] for each in (reference, candidate)]
    return (best[0] == best[1]).double()


def divergence_bits(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) [M] of two distributions in natural logarithms [M, V]."""
    return (log_p.exp() * (log_p - log_q)).sum(-1) / math.log(2)
