"""What is made of compute-sanitizer's words; a script stands for the program."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

import bench.gpu.sanitizer as sanitizer
from bench.gpu.sanitizer import TOOLS, sanitize
from bench.gpu.section import Plan
from plugins.toolchain import ToolMissingError

ROWS = '{"rows": {"edges 0": {"checked": 12, "wrong": {}}}}'


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """`said(text, rows)`: the program prints a text, and the checked process leaves these rows."""

    def say(text: str, rows: str = ROWS) -> None:
        script = tmp_path / "compute-sanitizer"
        find = 'while [ "$1" != --work ]; do shift; done'
        script.write_text(f"#!/bin/sh\n{find}\necho '{rows}' > \"$2/correctness.json\"\necho '{text}'\n")
        script.chmod(0o755)
        monkeypatch.setattr(sanitizer, "cuda_program", lambda name: script)

    return say


@pytest.mark.parametrize(
    ("text", "errors"),
    [
        ("========= ERROR SUMMARY: 0 errors", 0),
        ("========= ERROR SUMMARY: 1 error", 1),
        ("========= RACECHECK SUMMARY: 3 hazards displayed (3 errors, 0 warnings)", 3),
    ],
)
def test_errors_are_counted(text: str, errors: int, said: Callable[..., None], plan: Callable[..., Plan]) -> None:
    said(text)
    row = sanitize(plan(), "memcheck")
    assert (row["errors"], row["checked"], row["wrong"]) == (errors, 12, 0)


def test_nothing_counts_where_no_case_ran(said: Callable[..., None], plan: Callable[..., Plan]) -> None:
    said("========= ERROR SUMMARY: 0 errors", '{"rows": {}}')
    assert sanitize(plan(), "memcheck")["reason"] == "no case ran under it"
    said("========= Error: device not supported")
    assert sanitize(plan(), "memcheck")["reason"] == "the tool printed no summary"


def test_a_missing_program_is_named(monkeypatch: pytest.MonkeyPatch, plan: Callable[..., Plan]) -> None:
    def missing(name: str) -> Path:
        raise ToolMissingError(f"no CUDA program {name}")

    monkeypatch.setattr(sanitizer, "cuda_program", missing)
    assert sanitize(plan(), "racecheck") == {"errors": None, "reason": "no CUDA program compute-sanitizer"}


def test_every_tool_has_its_item(plan: Callable[..., Plan]) -> None:
    chosen = plan()
    on_gpu = dataclasses.replace(chosen, machine=dataclasses.replace(chosen.machine, emulated=False))
    assert [key for key, _ in sanitizer.SANITIZER.items(on_gpu)] == list(TOOLS)
    assert list(sanitizer.SANITIZER.items(chosen)) == []
