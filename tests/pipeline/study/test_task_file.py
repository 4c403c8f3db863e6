"""A study on the user's own items: they are what is asked and scored, and a file that does not do ends it at once."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.__main__ import main
from pipeline.study import run
from pipeline.study.grid import Grid
from pipeline.study.subject import Sizes, Subject
from pipeline.study.task_file import asked, check_items
from pipeline.tiny.problems import Problem, held_out

pytest.importorskip("matplotlib")
Made = Callable[..., Path]
Out = pytest.CaptureFixture[str]
ITEMS = [{"prompt": f"{n} and {n}?", "answer": f"{2 * n} in all", "kind": "twice"} for n in range(5)]
TASKS = "nll,match"


@pytest.fixture(scope="module")
def source(model: Made) -> Path:
    return model("llada", layers=1)


def task_file(folder: Path, items: list[dict[str, str]]) -> Path:
    path = folder / "items.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


def words(source: Path, task: Path, output: Path, *more: str) -> list[str]:
    sizes = ["--problems", "5", "--tokens", "40", "--questions", "2", "--masks", "2", "--trajectories", "2"]
    grid = ["--methods", "rtn", "--bits", "w4a4", "--set", "attention.prob_bits=8"]  # runs in torch
    return ["study", str(source), *grid, *sizes, "--tasks", TASKS, "--task", str(task), "-o", str(output), *more]


def test_items_of_the_file_are_asked_and_scored(source: Path, tmp_path: Path) -> None:
    task = task_file(tmp_path, ITEMS)
    assert main(words(source, task, tmp_path / "out")) == 0
    content = json.loads((tmp_path / "out/study.json").read_bytes())
    assert content["task"] == "items.jsonl"
    assert "Asked: items.jsonl." in (tmp_path / "out/study.md").read_text()
    full, rtn = content["rows"]
    for row in (full, rtn):
        assert row["measured"]["match"]["count"] == row["measured"]["match.twice"]["count"] == 5
    texts = [problem.prompt for problem in Subject(str(source), None, Sizes(problems=3), tmp_path, task).problems]
    assert texts[:3] == [item["prompt"] for item in ITEMS[:3]]


def test_without_a_file_held_out_problems_are_asked() -> None:
    assert asked(None, 7) == held_out(7)


def test_items_without_a_kind_have_one(tmp_path: Path) -> None:
    task = task_file(tmp_path, [{"prompt": "1", "answer": "2"}])
    assert asked(task, 1) == [Problem("task", "1", "2")]


def test_other_items_are_another_study(source: Path, tmp_path: Path) -> None:
    def fingerprints(items: list[dict[str, str]]) -> set[str]:
        request = run.Request(
            models=(str(source),),
            grid=Grid(methods=("rtn",), bits=("w4a4",), seeds={"w4a4": 1}),
            tasks=("match",),
            sizes=Sizes(problems=4),
            task=task_file(tmp_path, items),
        )
        return {order.fingerprint for order in run.make_plan(request).orders}

    assert not fingerprints(ITEMS) & fingerprints(ITEMS[::-1])
    assert fingerprints(ITEMS) == fingerprints(ITEMS)


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (["--problems", "6"], "has 5 items; match asks for 6: pass --problems 5 or less"),
        (["--tokens", "5000"], "masked tokens; expected 5000 or more; pass a smaller --tokens"),
        (["--tasks", "choice"], "line 1: wrong answers are made up for problems of the kinds add, story"),
        (["--task", "nothing.jsonl"], "nothing.jsonl cannot be read"),
    ],
)
def test_a_file_that_does_not_do_ends_the_study_before_it_begins(
    source: Path, tmp_path: Path, more: list[str], why: str, capsys: Out
) -> None:
    assert main(words(source, task_file(tmp_path, ITEMS), tmp_path / "out", *more)) == 2
    assert why in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_sizes_of_tasks_that_are_not_asked_do_not_count(tmp_path: Path) -> None:
    check_items(task_file(tmp_path, ITEMS), ("nll",), {"problems": 500, "questions": 200, "trajectories": 32})


def test_a_kind_that_is_no_text_is_refused(source: Path, tmp_path: Path, capsys: Out) -> None:
    task = tmp_path / "items.jsonl"
    task.write_text('{"prompt": "1", "answer": "2", "kind": 3}\n' * 9)
    assert main(words(source, task, tmp_path / "out")) == 4
    assert "items.jsonl line 1: kind is 3; expected text, or no kind" in capsys.readouterr().err
