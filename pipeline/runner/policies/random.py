"""LLaDA's random remasking: the schedule's count, anywhere in the block (arXiv 2502.09992, algorithm 4)."""

from pipeline.runner.candidates import Candidates, Picks


def random(candidates: Candidates) -> Picks:
    """As many positions as the quota says, drawn without looking at the tokens."""
    return candidates.masked & (candidates.rank(candidates.draws) < candidates.quota[:, None])
