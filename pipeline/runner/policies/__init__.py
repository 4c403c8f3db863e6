"""Which masked positions to commit: one function a file, pure numpy over all rows of the batch."""

from collections.abc import Callable

from pipeline.runner.candidates import Candidates, Picks
from pipeline.runner.policies.entropy import entropy
from pipeline.runner.policies.entropy_bound import entropy_bound
from pipeline.runner.policies.factor import factor
from pipeline.runner.policies.hierarchy import hierarchy
from pipeline.runner.policies.local_leap import local_leap
from pipeline.runner.policies.margin import margin
from pipeline.runner.policies.maskgit import maskgit
from pipeline.runner.policies.origin import origin
from pipeline.runner.policies.quota import quota
from pipeline.runner.policies.quota_or_threshold import quota_or_threshold
from pipeline.runner.policies.random import random
from pipeline.runner.policies.threshold import threshold

Policy = Callable[[Candidates], Picks]

POLICIES: dict[str, Policy] = {
    "quota": quota,
    "threshold": threshold,
    "factor": factor,
    "entropy_bound": entropy_bound,
    "quota_or_threshold": quota_or_threshold,
    "margin": margin,
    "maskgit": maskgit,
    "entropy": entropy,
    "origin": origin,
    "random": random,
    "local_leap": local_leap,
    "hierarchy": hierarchy,
}
WARM = frozenset({"margin", "maskgit", "entropy"})  # Dream's: they score under temperature and top_p
DRAWN = frozenset({"origin", "random"})  # these look at `Candidates.draws`
TIMED = frozenset({"margin", "maskgit", "entropy", "origin"})  # these look at `Candidates.flip`

__all__ = ["DRAWN", "POLICIES", "TIMED", "WARM", "Candidates", "Picks", "Policy"]
