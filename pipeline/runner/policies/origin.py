"""Dream's `origin`: masked diffusion as it was trained, each mask on its own (arXiv 2406.07524, section 3)."""

from pipeline.runner.candidates import Candidates, Picks


def origin(candidates: Candidates) -> Picks:
    """Each masked position with the probability that the time grid gives; the likeliest one if none would go."""
    flips = candidates.draws < candidates.flip[:, None]
    return candidates.masked & (flips | (candidates.rank(candidates.draws) < 1))
