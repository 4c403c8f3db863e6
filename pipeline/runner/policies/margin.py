"""Dream's `topk_margin`: positions where the best token stands out go first (arXiv 2508.15487)."""

from pipeline.runner.candidates import Candidates, Picks


def margin(candidates: Candidates) -> Picks:
    """The time grid's count of positions with the largest p1 - p2."""
    return candidates.grid(-candidates.margin)
