"""Exact match by kind of problem: is the generated answer, decoded and whitespace-normalised, the expected one?"""

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.evaluation import is_right
from pipeline.metrics.free_run import FreeRun
from pipeline.metrics.sums import Sums
from pipeline.runner import TextModel
from pipeline.tiny.problems import Problem


@dataclass(frozen=True, kw_only=True)
class ExactMatch:
    """1 for each right answer, over all problems and over those of each kind; `nfe` forward passes a problem."""

    total: Sums
    kinds: dict[str, Sums]
    nfe: Sums


def exact_match(model: TextModel, problems: Sequence[Problem], run: FreeRun) -> ExactMatch:
    """Judge a run over the problems' prompts, in their order."""
    eos = model.settings.eos_id
    right = []
    for problem, region in zip(problems, run.ids, strict=True):
        ids = region[: region.index(eos)] if eos in region else region
        right.append(is_right(model, ids, problem.answer))
    kinds = dict.fromkeys(problem.kind for problem in problems)
    pairs = list(zip(problems, right, strict=True))
    return ExactMatch(
        total=Sums.of_shares(right),
        kinds={kind: Sums.of_shares(each for problem, each in pairs if problem.kind == kind) for kind in kinds},
        nfe=Sums.of_shares(run.nfe),
    )
