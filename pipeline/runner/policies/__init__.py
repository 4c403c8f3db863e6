"""Which masked positions to commit: one function a file, pure numpy over all rows of the batch."""

from collections.abc import Callable

from pipeline.runner.candidates import Candidates, Picks
from pipeline.runner.policies.quota import quota
from pipeline.runner.policies.threshold import threshold

Policy = Callable[[Candidates], Picks]

POLICIES: dict[str, Policy] = {
    "quota": quota,
    "threshold": threshold,
}

__all__ = ["POLICIES", "Candidates", "Picks", "Policy"]
