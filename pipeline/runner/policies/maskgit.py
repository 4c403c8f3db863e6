"""Dream's `maskgit_plus`: positions with the surest token go first (arXiv 2508.15487, after arXiv 2202.04200)."""

from pipeline.runner.candidates import Candidates, Picks


def maskgit(candidates: Candidates) -> Picks:
    """The time grid's count of positions with the largest p of the proposed token."""
    return candidates.grid(candidates.doubt)
