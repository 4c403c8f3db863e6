"""The tasks of a study, by name: what each measures on one subject, as JSON with the sums of every sample.

Full precision is measured too, where a task has a figure of its own for it; `None` where it would be compared with
itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pipeline.metrics.choices import choice_score, questions
from pipeline.metrics.exact_match import exact_match
from pipeline.metrics.free_run import free_run
from pipeline.metrics.masked_nll import masked_nll
from pipeline.metrics.sums import as_json
from pipeline.metrics.trajectory import trajectory
from pipeline.runner import GenerateOptions
from pipeline.study.subject import Subject

QUESTION_SEED = 1


def nll(subject: Subject) -> Any:
    """Bits a masked token."""
    if subject.recipe is None:
        return as_json(masked_nll(subject.reference, subject.grid, subject.settings))
    return as_json(subject.forced.candidate)


def agreement(subject: Subject) -> Any:
    """Argmax agreement and KL with full precision at masked positions."""
    return None if subject.recipe is None else as_json(subject.forced.agreement)


def match(subject: Subject) -> Any:
    """Exact match by kind, and the ids themselves, from which agreement of free runs is taken."""
    problems = subject.problems[: subject.sizes.problems]
    prompts = [subject.text.encode(problem.prompt) for problem in problems]
    run = free_run(subject.text.session, subject.settings, prompts, GenerateOptions())
    score = as_json(exact_match(subject.text, problems, run))
    return {"score": score, "run": as_json(run), "eos_id": subject.settings.eos_id}


def choice(subject: Subject) -> Any:
    """Multiple choice by likelihood."""
    asked = questions(subject.problems[: subject.sizes.questions], QUESTION_SEED)
    score = choice_score(subject.candidate, subject.tokenizer, subject.settings, asked, samples=subject.sizes.masks)
    return as_json(score)


def follow(subject: Subject) -> Any:
    """Error of the hidden states at each denoising step, free-running and forced; equal step counts for all."""
    if subject.recipe is None:
        return None
    problems = subject.problems[: subject.sizes.trajectories]
    prompts = [subject.text.encode(problem.prompt) for problem in problems]
    options = GenerateOptions(policy="quota", steps=subject.sizes.steps)
    found = trajectory(subject.reference, subject.candidate, subject.settings, prompts, options)
    return as_json(found)


TASKS: dict[str, Callable[[Subject], Any]] = {
    "nll": nll,
    "agreement": agreement,
    "match": match,
    "choice": choice,
    "trajectory": follow,
}
