"""LLaDA2's rule: all that is sure if that is enough, else the schedule (arXiv 2512.15745, section 5)."""

import numpy as np

from pipeline.runner.candidates import Candidates, Picks


def quota_or_threshold(candidates: Candidates) -> Picks:
    """Every position with p above the threshold where they are at least the quota, else the quota's surest."""
    sure = candidates.masked & (candidates.p > candidates.threshold)
    enough = sure.sum(axis=1) >= candidates.quota
    return np.where(enough[:, None], sure, candidates.surest())
