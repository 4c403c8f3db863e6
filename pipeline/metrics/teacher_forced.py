"""Reference and candidate on one noise grid, each run once: the NLL of both, and how far they agree."""

from dataclasses import dataclass

import numpy as np

from pipeline.metrics.agreement import Agreement, divergence_bits, same_best
from pipeline.metrics.masked_nll import MaskedNll, by_canvas, by_sample, log_probabilities, nll_of, token_bits
from pipeline.metrics.noise_grid import NoiseGrid, masked_rows
from pipeline.metrics.probe import Probe
from pipeline.runner.settings import Settings


@dataclass(frozen=True, kw_only=True)
class TeacherForced:
    """What `masked_nll` gives for each of the two, and their agreement."""

    reference: MaskedNll
    candidate: MaskedNll
    agreement: Agreement


def teacher_forced(
    reference: Probe, candidate: Probe, grid: NoiseGrid, settings: Settings, *, size: int = 32
) -> TeacherForced:
    """`size` canvases a pass."""
    number = len(grid.states.kv_len)
    bits, other_bits, same, divergence = np.zeros((4, number))
    for rows in masked_rows(grid.states, settings, size):
        observed = reference.observe(rows.feeds), candidate.observe(rows.feeds)
        log_p, log_q = (log_probabilities(each, rows) for each in observed)
        bits += by_canvas(rows, token_bits(log_p, rows), number)
        other_bits += by_canvas(rows, token_bits(log_q, rows), number)
        same += by_canvas(rows, same_best(*observed, rows), number)
        divergence += by_canvas(rows, divergence_bits(log_p, log_q), number)
    argmax, kl = (by_sample(values, grid) for values in (same, divergence))
    return TeacherForced(
        reference=nll_of(bits, grid), candidate=nll_of(other_bits, grid), agreement=Agreement(argmax=argmax, kl=kl)
    )
