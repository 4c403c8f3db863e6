"""Fast-dLLM's factor rule: the more tokens at once, the surer each must be (arXiv 2505.22618, theorem 1)."""

from pipeline.runner.candidates import Candidates, Picks


def factor(candidates: Candidates) -> Picks:
    """The n surest positions, n the largest with (n + 1)(1 - p of the n-th) < factor, and never fewer than quota."""
    rank = candidates.rank()
    # n + 1 grows and p falls along the ranks, so what passes is a prefix of them.
    passes = (rank + 2) * (candidates.doubt / (1.0 + candidates.doubt)) < candidates.factor
    return candidates.masked & (passes | (rank < candidates.quota[:, None]))
