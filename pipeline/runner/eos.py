"""When an end-of-text may be committed; looks at the proposed ids, so it is right at any temperature.

none: like any other token. forbid: never (its logit is banned). last: only when its block has nothing else left.
threshold: only when it is sure enough, or nothing else is left. Shape letters: B batch, R head rows, V vocabulary rows.
"""

import numpy as np

from pipeline.backends.backend import Floats, Ids
from pipeline.runner.candidates import Picks, Scores

BANNED = np.float32(-1e9)  # finite: -inf would make p ln p of the entropy NaN


def forbid(bias: Floats, eos_id: int) -> Floats:
    """The logit bias [V] with end-of-text banned."""
    banned = bias.copy()
    banned[eos_id] = BANNED
    return banned


def eligible(
    mode: str, masked: Picks, ids: Ids, log_probability: Scores, *, eos_id: int, eos_threshold: float
) -> Picks:
    """The masked positions that a policy may choose from [B, R]; a row with a masked position keeps at least one."""
    if mode in ("none", "forbid"):
        return masked
    ends = ids == eos_id
    if mode == "threshold":
        ends &= np.exp(log_probability) < eos_threshold
    others = masked & ~ends
    return np.where(others.any(axis=1, keepdims=True), others, masked)
