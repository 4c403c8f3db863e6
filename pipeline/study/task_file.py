"""What a study asks its models: items of a file of the user's, or the built-in problems."""

from __future__ import annotations

from pathlib import Path

from pipeline.errors import UsageFault
from pipeline.evaluation import read_task
from pipeline.metrics.choices import WRONG
from pipeline.tiny.problems import Problem, held_out

# The tasks that ask for so many items, by the size that says how many.
SIZES = {"match": "problems", "choice": "questions", "trajectory": "trajectories"}


def asked(task: Path | None, count: int) -> list[Problem]:
    """The first items of the file, or so many held-out problems. Raises what `read_task` does."""
    if task is None:
        return held_out(count)
    return [Problem(item.kind, item.prompt, item.answer) for item in read_task(task, count)]


def check_items(task: Path, tasks: tuple[str, ...], sizes: dict[str, int]) -> None:
    """Raise UsageFault where the file has fewer items than `sizes` ask for, or none that a task could ask."""
    items = read_task(task)
    for name in tasks:
        if (size := SIZES.get(name)) and sizes[size] > len(items):
            raise UsageFault(
                f"{task} has {len(items)} items; {name} asks for {sizes[size]}: pass --{size} {len(items)} or less"
            )
    strange = next((item for item in items if item.kind not in WRONG), None)
    if "choice" in tasks and strange:
        raise UsageFault(
            f"--tasks choice cannot ask {task} line {strange.line}: wrong answers are made up for problems of the "
            f"kinds {', '.join(WRONG)}, and this one is of kind {strange.kind!r}; leave choice out"
        )
