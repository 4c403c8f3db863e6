"""LLaDA's low-confidence remasking: a fixed number of commits a step (arXiv 2502.09992, algorithm 5)."""

from pipeline.runner.candidates import Candidates, Picks


def quota(candidates: Candidates) -> Picks:
    """The quota's surest positions, nothing else."""
    return candidates.surest()
