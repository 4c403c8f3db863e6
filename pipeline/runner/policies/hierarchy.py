"""dInfer's hierarchical decoding: halve every gap at its surest token, far from its neighbours (arXiv 2510.08666)."""

import numpy as np

from pipeline.runner.candidates import Candidates, Picks

LOW = 0.62 / 0.92  # of the threshold: what the best of a gap must reach, dInfer's pair for LLaDA-MoE


def hierarchy(candidates: Candidates) -> Picks:
    """Every position with p >= threshold, the surest of each run of masks with p >= LOW of it, the quota's surest."""
    masked, rank = candidates.masked, candidates.rank()
    begins = masked & ~np.pad(masked, ((0, 0), (1, 0)))[:, :-1]
    run = np.cumsum(begins, axis=1)
    row = np.arange(len(run))[:, None]
    best = np.full((len(run), run.shape[1] + 1), run.shape[1])
    np.minimum.at(best, (row, run), np.where(masked, rank, run.shape[1]))
    fair = candidates.p >= candidates.threshold * LOW
    split = (rank == best[row, run]) & fair
    return np.asarray(masked & (candidates.sure | split | (rank < candidates.quota[:, None])))
