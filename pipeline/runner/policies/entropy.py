"""Dream's `entropy`: positions whose whole distribution is the sharpest go first (arXiv 2508.15487)."""

from pipeline.runner.candidates import Candidates, Picks


def entropy(candidates: Candidates) -> Picks:
    """The time grid's count of positions with the least entropy."""
    return candidates.grid(-candidates.neg_entropy)
