"""LocalLeap: a token near a sure one may be less sure (arXiv 2510.07081)."""

import numpy as np

from pipeline.runner.candidates import Candidates, Picks

RADIUS = 4  # positions to either side of an anchor
RELAXED = 0.75 / 0.9  # of the threshold; the paper has 0.75 beside an anchor of 0.9


def local_leap(candidates: Candidates) -> Picks:
    """Anchors (p >= threshold), masked neighbours of one with p >= the relaxed threshold, and the quota's surest."""
    anchors = candidates.masked & candidates.sure
    width = anchors.shape[1]
    total = np.concatenate([np.zeros((len(anchors), 1), dtype=np.int64), np.cumsum(anchors, axis=1)], axis=1)
    here = np.arange(width)
    low, high = np.maximum(here - RADIUS, 0), np.minimum(here + RADIUS + 1, width)
    near = total[:, high] > total[:, low]
    relaxed = near & (candidates.p >= candidates.threshold * RELAXED)
    return (candidates.masked & (anchors | relaxed)) | candidates.surest()
