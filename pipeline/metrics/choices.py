"""Multiple choice by likelihood: does a model find the right answer likelier than three that are wrong in one place?

Likelihoods are those of `runner/scoring.py`, from every logit of the model in torch, so a candidate in simulation has
them, too.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from pipeline.calibration.states import Sample
from pipeline.errors import UsageFault
from pipeline.metrics.masked_nll import Floats, canvas_bits
from pipeline.metrics.noise_grid import canvases
from pipeline.metrics.probe import Probe
from pipeline.metrics.sums import Sums
from pipeline.runner.scoring import stratified_masks
from pipeline.runner.settings import Settings
from pipeline.tiny.problems import LETTERS, Problem

OPTIONS = 4
TRIES = 100


@dataclass(frozen=True, kw_only=True)
class Question:
    """A prompt with options of one form; `right` is the place of the only right one."""

    kind: str
    prompt: str
    options: tuple[str, ...]
    right: int


@dataclass(frozen=True, kw_only=True)
class ChoiceScore:
    """1 for each question whose right option is the likeliest, over all and by kind; `margin` in bits.

    `margin` is what the likeliest wrong option needs more than the right one.
    """

    right: Sums
    margin: Sums
    kinds: dict[str, Sums]


def slip(draw: random.Random, answer: str) -> str:
    """One letter or digit becomes another; never a zero, which could lead a number."""
    place = draw.choice([i for i, c in enumerate(answer) if c.isalnum()])
    others = "123456789" if answer[place].isdigit() else LETTERS
    return answer[:place] + draw.choice(others.replace(answer[place], "")) + answer[place + 1 :]


def swap(draw: random.Random, answer: str) -> str:
    """Two items of a list change places; one slips where all are equal."""
    items = answer.split(" ")
    pairs = [(i, j) for j in range(len(items)) for i in range(j) if items[i] != items[j]]
    if not pairs:
        return slip(draw, answer)
    i, j = draw.choice(pairs)
    items[i], items[j] = items[j], items[i]
    return " ".join(items)


# How an answer of each kind of problem goes wrong in one place and keeps its form.
WRONG: dict[str, Callable[[random.Random, str], str]] = {
    "add": slip,
    "story": slip,
    "sort": swap,
    "copy": slip,
    "reverse": swap,
    "record": slip,
}


def questions(problems: Sequence[Problem], seed: int) -> list[Question]:
    """One question a problem; its wrong options and their order are drawn by (seed, prompt)."""
    return [_question(problem, random.Random(f"{seed}/{problem.prompt}")) for problem in problems]


def _question(problem: Problem, draw: random.Random) -> Question:
    options = {problem.answer: None}
    for _ in range(TRIES):
        options[WRONG[problem.kind](draw, problem.answer)] = None
        if len(options) == OPTIONS:
            break
    assert len(options) == OPTIONS, problem
    order = draw.sample(list(options), OPTIONS)
    return Question(kind=problem.kind, prompt=problem.prompt, options=tuple(order), right=order.index(problem.answer))


def choice_score(
    probe: Probe,
    tokenizer: Tokenizer,
    settings: Settings,
    asked: Sequence[Question],
    *,
    samples: int = 128,
    seed: int = 0,
    size: int = 64,
) -> ChoiceScore:
    """Ask with `samples` masks an option, `size` canvases a pass; raises UsageFault for one that is too long."""
    right, margin = [], []
    for number, question in enumerate(asked):
        bits = option_bits(probe, tokenizer, settings, question, samples=samples, key=f"{seed}/{number}", size=size)
        margin.append(float(np.delete(bits, question.right).min() - bits[question.right]))
        right.append(margin[-1] > 0)
    kinds = dict.fromkeys(question.kind for question in asked)
    return ChoiceScore(
        right=Sums.of_shares(right),
        margin=Sums.of_shares(margin),
        kinds={
            kind: Sums.of_shares(each for question, each in zip(asked, right, strict=True) if question.kind == kind)
            for kind in kinds
        },
    )


def option_bits(
    probe: Probe, tokenizer: Tokenizer, settings: Settings, question: Question, *, samples: int, key: str, size: int
) -> Floats:
    """Estimate of -log2 p of each option."""
    prompt = tokenizer.encode(question.prompt, add_special_tokens=False).ids
    rows, shares = [], []
    for option in question.options:
        answer = tokenizer.encode(option, add_special_tokens=False).ids
        if not answer:
            raise ValueError(f"option {option!r} of {question.prompt!r} has no tokens")
        sample = Sample([*prompt, *answer, settings.eos_id], len(prompt))
        if (length := len(sample.ids)) > settings.max_length:
            raise UsageFault(
                f"{question.prompt!r} with an option has {length} tokens; the model takes {settings.max_length}"
            )
        for masked in stratified_masks(len(answer), samples, random.Random(f"{key}/{len(answer)}")):
            rows.append((sample, [len(prompt) + place for place in masked]))
            shares.append(len(masked) / len(answer))
    weighed = canvas_bits(probe, canvases(rows, settings), settings, size=size) / np.array(shares)
    means: Floats = weighed.reshape(len(question.options), samples).mean(1)
    return means
