"""The generated problems: every answer is right, and held-out prompts never reach training."""

import json
import re
from itertools import islice
from pathlib import Path

import pytest

from pipeline.tiny.problems import KINDS, Problem, held_out, is_held_out, problems

DRAWN = list(islice(problems(7, held_out=False), 1200))


def of_kind(kind: str) -> list[Problem]:
    return [problem for problem in DRAWN if problem.kind == kind]


def test_sums_are_right_and_every_step_is() -> None:
    for problem in of_kind("add"):
        a, b = map(int, problem.prompt.removesuffix("=").split("+"))
        *steps, total = problem.answer.split(";")
        assert int(total) == a + b
        assert len(steps) == 3
        for step in steps:
            left, right = step.split("=")
            assert sum(map(int, left.split("+"))) == int(right)


def test_sums_have_carries() -> None:
    carried = [problem for problem in of_kind("add") if "+1=" in problem.answer]
    assert len(carried) > len(of_kind("add")) / 2


def test_stories_are_worked_right() -> None:
    for problem in of_kind("story"):
        numbers = [int(n) for n in re.findall(r"\d+", problem.prompt)]
        bought = "buys" in problem.prompt
        have, first, second = numbers
        expected = have + first - second if bought else have - first + second
        assert int(problem.answer.rpartition("=")[2]) == expected >= 0
        for step in problem.answer.split(";"):
            left, right = step.split("=")
            a, sign, b = re.fullmatch(r"(\d+)([+-])(\d+)", left).groups()  # type: ignore[union-attr]
            assert (int(a) + int(b) if sign == "+" else int(a) - int(b)) == int(right)


def test_lists_words_and_records_follow_their_format() -> None:
    for problem in DRAWN:
        body = problem.prompt.partition(" ")[2].removesuffix(":")
        if problem.kind == "sort":
            assert problem.answer == " ".join(sorted(body.split()))
        elif problem.kind == "reverse":
            assert problem.answer == " ".join(reversed(body.split()))
        elif problem.kind == "copy":
            assert problem.answer == body
        elif problem.kind == "record":
            fields = body.split()
            assert json.loads(problem.answer) == dict(zip(fields[::2], map(int, fields[1::2]), strict=True))


def test_kinds_take_turns() -> None:
    assert [problem.kind for problem in DRAWN[:12]] == [*KINDS, *KINDS]


def test_held_out_prompts_are_apart_from_training() -> None:
    kept = held_out(500)
    assert len({problem.prompt for problem in kept}) == 500
    assert all(is_held_out(problem.prompt) for problem in kept)
    assert not any(is_held_out(problem.prompt) for problem in DRAWN)


def test_equal_seeds_give_equal_problems() -> None:
    assert list(islice(problems(7, held_out=False), 50)) == DRAWN[:50]
    assert list(islice(problems(8, held_out=False), 50)) != DRAWN[:50]


def test_the_shipped_task_file_is_what_the_generator_makes() -> None:
    path = Path(__file__).parents[3] / "pipeline" / "tiny" / "held_out.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert lines == [{"prompt": p.prompt, "answer": p.answer, "kind": p.kind} for p in held_out(500)]


@pytest.mark.parametrize("kind", KINDS)
def test_answers_fit_the_default_canvas(kind: str) -> None:
    from pipeline.tiny.tokenizer import train_tokenizer

    tokenizer = train_tokenizer([])
    assert max(len(tokenizer.encode(problem.answer).ids) for problem in of_kind(kind)) < 32
