"""The problems that no method was tuned on: right, apart from the other models', in tokens of their own."""

import datetime
import re
from itertools import groupby, islice, pairwise
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from pipeline.evaluation import read_task
from pipeline.models import BUILTIN
from pipeline.models.checkpoint import open_checkpoint
from pipeline.tiny.problems import KINDS, Problem, fingerprint, held_out, problems
from pipeline.tiny.publish import CALIBRATION
from pipeline.tiny.reference import REFERENCES
from pipeline.tiny.unseen import UNSEEN_KINDS

DRAWN = list(islice(problems(7, held_out=False, kinds=UNSEEN_KINDS), 1200))
UNSEEN = REFERENCES["tiny-unseen"]
PUBLISHED = Path(__file__).parents[3] / "bench" / "unseen"


def of_kind(kind: str) -> list[Problem]:
    return [problem for problem in DRAWN if problem.kind == kind]


def test_numerals_stand_for_the_number() -> None:
    worth = {"I": 1, "V": 5, "X": 10, "L": 50, "C": 100, "D": 500, "M": 1000}
    for problem in of_kind("roman"):
        values = [worth[numeral] for numeral in problem.answer]
        # One that stands before a greater one is taken away.
        signed = [-a if a < b else a for a, b in pairwise([*values, 0])]
        assert sum(signed) == int(problem.prompt.removeprefix("Roman "))
        assert not re.search(r"(I|X|C|M)\1{3}|(V|L|D)\2", problem.answer.replace("MMM", ""))


def test_dates_are_the_same_days() -> None:
    for problem in of_kind("date"):
        told = datetime.datetime.strptime(problem.prompt, "ISO date of %d %B %Y")
        assert problem.answer == told.date().isoformat()


def test_runs_have_their_lengths() -> None:
    for problem in of_kind("expand"):
        runs = re.findall(r"([A-Z])(\d)", problem.prompt.removeprefix("unpack "))
        assert [(letter, str(len(list(run)))) for letter, run in groupby(problem.answer)] == runs


def test_ranks_follow_from_what_is_told() -> None:
    for problem in of_kind("ladder"):
        order = problem.answer.split(", ")
        told = re.findall(r"(\w+) is \w+ than (\w+)\.", problem.prompt)
        assert sorted(told) == sorted(pairwise(order))
        assert len(set(order)) == len(order) == len(told) + 1


def test_letters_move_on_in_the_alphabet() -> None:
    for problem in of_kind("shift"):
        by, word = re.fullmatch(r"ROT(\d) ([A-Z]+)", problem.prompt).groups()  # type: ignore[union-attr]
        moved = [(ord(to) - ord(of)) % 26 for of, to in zip(word, problem.answer, strict=True)]
        assert set(moved) == {int(by)}


def test_letters_are_counted_in_the_order_asked() -> None:
    for problem in of_kind("count"):
        first, second, word = re.fullmatch(r"How many (.) and (.) has (\w+)\?", problem.prompt).groups()  # type: ignore[union-attr]
        assert set(word) <= {first, second}
        assert problem.answer == f"{first}={word.count(first)} {second}={word.count(second)}"


def test_nothing_is_shared_with_the_other_models() -> None:
    assert not UNSEEN_KINDS.keys() & KINDS.keys()
    assert fingerprint(UNSEEN_KINDS) != fingerprint()
    kept = {problem.prompt for problem in held_out(2000, kinds=UNSEEN_KINDS)}
    assert len(kept) == 2000
    assert not kept & {problem.prompt for problem in DRAWN}


def test_tokens_are_others_and_come_back_as_text() -> None:
    own, other = UNSEEN.tokenizer(), REFERENCES["tiny-llada"].tokenizer()
    words = {text for text in own.get_vocab() if len(text) > 1 and not text.startswith("<|")}
    assert len(words) > 100
    assert len(words & other.get_vocab().keys()) < len(words) / 4
    for problem in DRAWN[:300]:
        for text in (problem.prompt, problem.answer):
            assert own.decode(own.encode(text).ids) == text


@pytest.mark.parametrize("kind", UNSEEN_KINDS)
def test_answers_fit_the_default_canvas(kind: str) -> None:
    tokenizer = UNSEEN.tokenizer()
    assert max(len(tokenizer.encode(problem.answer).ids) for problem in of_kind(kind)) < 32


def test_what_was_published_is_what_the_generators_make() -> None:
    drawn = {
        "held_out.jsonl": held_out(UNSEEN.held_out, kinds=UNSEEN_KINDS),
        "calibration.jsonl": list(islice(problems(0, held_out=False, kinds=UNSEEN_KINDS), CALIBRATION)),
    }
    for name, expected in drawn.items():
        found = [Problem(item.kind, item.prompt, item.answer) for item in read_task(PUBLISHED / name)]
        assert found == expected
    checkpoint = open_checkpoint(PUBLISHED / "tiny-unseen")
    assert UNSEEN.config(UNSEEN.tokenizer()) == checkpoint.config
    own = Tokenizer.from_file(str(checkpoint.folder / "tokenizer.json"))
    assert own.get_vocab() == UNSEEN.tokenizer().get_vocab()


@pytest.mark.parametrize("name", BUILTIN)
def test_the_table_has_the_shapes_that_were_shipped(name: str) -> None:
    reference = REFERENCES[name]
    assert reference.config(reference.tokenizer()) == open_checkpoint(BUILTIN[name]).config
