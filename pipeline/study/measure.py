"""One cell, start to end, in whatever process: quantise once, run every task, hand back JSON.

Nothing is read but the model and the order, and nothing is kept: who asked writes the outcome down.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import EnvironmentFault, InputRefused, UsageFault, ValidationFailed
from pipeline.fingerprint import code_digest
from pipeline.folder import canonical_json
from pipeline.recipe import Recipe
from pipeline.study.grid import Cell
from pipeline.study.subject import Sizes, Subject
from pipeline.study.tasks import TASKS

# What the method or the numbers do to a model: a result, not the end of the study.
RESULTS = (UsageFault, InputRefused, ValidationFailed)

Outcome = dict[str, Any]

# Commands, what plans the cells (their fingerprints hold the plan) and what is made of the sums: other words about the
# same figures do not ask for new ones.
_WORDS = ("engines", "findings", "grid", "memory", "plots", "run", "store", "summary", "table")
PRESENTATION = (
    "pipeline/__main__.py",
    "pipeline/pictures.py",
    "pipeline/progress.py",
    "pipeline/cli/*.py",
    "pipeline/outliers/*.py",
    "pipeline/metrics/bootstrap.py",
    *(f"pipeline/study/{name}.py" for name in _WORDS),
)


def measuring_code() -> str:
    """Digest of the code that decides what a cell measures."""
    return code_digest(*PRESENTATION)


@dataclass(frozen=True, kw_only=True)
class Order:
    """One cell to measure; `recipe` None is full precision, `fingerprint` stands for all that decides the outcome.

    `source` is the cell's model wherever the work is done: builtin:NAME or an absolute path; `task` is absolute, too.
    """

    cell: Cell
    source: str
    recipe: Recipe | None
    tasks: tuple[str, ...]
    sizes: Sizes
    task: Path | None
    threads: int
    code: str
    fingerprint: str


def measure(order: Order) -> Outcome:
    """The outcome of one cell; a cell that the method fails on says why, the same way every time.

    Raises EnvironmentFault where other code runs than where the study was started.
    """
    if order.code != measuring_code():
        raise EnvironmentFault("this worker has another version of dllmc than the study; install the same on all")
    torch.set_num_threads(order.threads)
    outcome: Outcome = {"fingerprint": order.fingerprint, "cell": asdict(order.cell), "tasks": {}, "seconds": {}}
    with tempfile.TemporaryDirectory(prefix="dllmc-study-") as scratch:
        try:
            _measure(order, Path(scratch), outcome)
        except RESULTS as fault:
            if order.recipe is None:
                raise
            outcome |= {"tasks": {}, "failed": str(fault)}
    return outcome


def _measure(order: Order, scratch: Path, outcome: Outcome) -> None:
    clock = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal clock
        outcome["seconds"][name] = round(time.perf_counter() - clock, 2)
        clock = time.perf_counter()

    subject = Subject(order.source, order.recipe, order.sizes, scratch, order.task)
    if order.recipe is not None:
        account = subject.account
        outcome["linears"] = {"quantised": account.linears_quantised, "kept": account.linears_kept}
        outcome["size_bytes"] = sum(row.size_bytes for row in account.formats)
    lap("quantise")
    if "match" in order.tasks:
        outcome["runs_in"] = "ort" if subject.exportable else "torch"
        assert subject.text
        lap("export")
    for name in order.tasks:
        found = TASKS[name](subject)
        if found is not None:
            outcome["tasks"][name] = found
        lap(name)
    try:
        canonical_json(outcome)
    except ValueError as fault:
        raise ValidationFailed("the model's logits are NaN or infinite") from fault
