"""EB-Sampler: as many tokens at once as their joint error allows (arXiv 2505.24857, algorithm 1)."""

import numpy as np

from pipeline.runner.candidates import Candidates, Picks


def entropy_bound(candidates: Candidates) -> Picks:
    """The longest prefix by entropy, lowest first, whose sum without its largest stays within the bound."""
    rank = candidates.rank(-candidates.neg_entropy)
    entropy = np.where(candidates.masked, -candidates.neg_entropy, 0.0)
    sorted_entropy = np.take_along_axis(entropy, np.argsort(rank, axis=1), axis=1)
    before = np.cumsum(sorted_entropy, axis=1) - sorted_entropy
    passes = np.take_along_axis(before <= candidates.entropy_bound, rank, axis=1)
    return candidates.masked & (passes | (rank < candidates.quota[:, None]))
