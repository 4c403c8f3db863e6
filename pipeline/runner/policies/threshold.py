"""Fast-dLLM's confidence threshold (arXiv 2505.22618, algorithm 1), with a least speed."""

from pipeline.runner.candidates import Candidates, Picks


def threshold(candidates: Candidates) -> Picks:
    """Every position with p >= threshold, and always the quota's surest (by default one)."""
    return (candidates.masked & candidates.sure) | candidates.surest()
