"""The study from question to folder: plan the cells, measure those that are missing, write table and pictures."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.bundle import made_with
from pipeline.calibration.corpus import calibration_states
from pipeline.calibration.sources import source_digest
from pipeline.errors import UsageFault
from pipeline.fingerprint import digest_of, model_digest
from pipeline.folder import os_faults, user_path, write_bytes, write_json
from pipeline.models import lasting_name, resolve
from pipeline.models.checkpoint import Checkpoint, open_checkpoint
from pipeline.pictures import check_matplotlib
from pipeline.progress import Progress
from pipeline.quantize import check_format
from pipeline.recipe import Recipe
from pipeline.study import plots, summary
from pipeline.study.engines import ENGINES
from pipeline.study.findings import findings
from pipeline.study.grid import FULL, Cell, Grid, known
from pipeline.study.measure import Order, measure, measuring_code
from pipeline.study.memory import Elements, check_memory, count_elements
from pipeline.study.store import StudyFolder
from pipeline.study.subject import Sizes, Subject
from pipeline.study.table import markdown
from pipeline.study.task_file import check_items
from pipeline.study.tasks import TASKS
from pipeline.version import VERSION

STUDY, TABLE, SCRATCH = "study.json", "study.md", "scratch"


@dataclass(frozen=True, kw_only=True)
class Request:
    """All that decides the numbers; how many processes measure them does not. `task` is a file of items to ask."""

    models: tuple[str, ...]
    grid: Grid
    tasks: tuple[str, ...]
    sizes: Sizes
    task: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The models, the cells in their order, and those that cannot be, with the reason."""

    models: dict[str, str]  # with the digest of their files
    elements: dict[str, Elements]
    orders: tuple[Order, ...]
    impossible: tuple[tuple[Cell, str], ...]


def study(
    request: Request, output: Path, *, engine: str = "local", jobs: int | None = None, report: Progress
) -> dict[str, Any]:
    """Measure what is missing in the folder `output`; returns what study.json says.

    Raises UsageFault for names that are none and where no cell is possible, EnvironmentFault for a missing package,
    WillNotFit where the cells need more memory than there is.
    """
    known([engine], ENGINES, "engine", "--engine")
    check_matplotlib()
    plan = make_plan(request)
    with StudyFolder(output) as folder:
        with _scratch(folder.path) if engine == "local" else nullcontext():
            _measure_missing(plan, folder, engine, jobs, report)
        measured = [(order.cell, _kept(folder, order)) for order in plan.orders]
        return _write(request, measured, plan, folder.path)


def make_plan(request: Request) -> Plan:
    """Every cell of the grid on every model, with its recipe checked against method, model and calibration text.

    Raises UsageFault for names that are none and where no cell is possible, InputRefused for a text that does not do.
    """
    request.grid.check()
    known(request.tasks, TASKS, "task", "--tasks")
    if request.task:
        check_items(request.task, request.tasks, asdict(request.sizes))
    orders: list[Order] = []
    impossible: list[tuple[Cell, str]] = []
    models: dict[str, str] = {}
    elements: dict[str, Elements] = {}
    for model in dict.fromkeys(request.models):
        checkpoint = open_checkpoint(resolve(model))
        files = models[model] = model_digest(checkpoint)
        elements[model] = count_elements(checkpoint)
        calibrated: list[Recipe] = []
        source = lasting_name(model, checkpoint.folder)
        for cell in request.grid.cells(model):
            recipe = None
            try:
                if cell.method != FULL:
                    recipe = request.grid.recipe(cell)
                    check_format(recipe)
                    recipe.check_against(checkpoint.config)
            except UsageFault as fault:
                impossible.append((cell, str(fault)))
                continue
            if recipe and cell.states:
                calibrated.append(recipe)
            orders.append(_order(request, cell, recipe, source, files))
        _check_texts(checkpoint, calibrated)
        if request.task:
            _check_tokens(model, request)
    if impossible and all(order.recipe is None for order in orders):
        raise UsageFault(f"no cell of this study is possible: {impossible[0][1]}")
    return Plan(models=models, elements=elements, orders=tuple(orders), impossible=tuple(impossible))


def _check_texts(checkpoint: Checkpoint, recipes: Sequence[Recipe]) -> None:
    """Draw from each text once: what is wrong with it is the user's to mend, and no result of a method."""
    different = {(part.source, part.samples, part.length): part for part in (recipe.calibration for recipe in recipes)}
    for part in different.values():
        if part.source != "builtin":
            tokenizer = checkpoint.tokenizer()
            calibration_states(part, tokenizer, checkpoint.config)


def _check_tokens(model: str, request: Request) -> None:
    """Raise UsageFault where the items have fewer masked tokens than are to be measured."""
    if {"nll", "agreement"} & {*request.tasks}:
        try:
            assert Subject(model, None, request.sizes, Path(), request.task).grid
        except ValueError as fault:
            raise UsageFault(f"{request.task}: {fault}; pass a smaller --tokens, or a file with more items") from None


def _anywhere(recipe: Recipe) -> Recipe:
    """The recipe with the path of its calibration text absolute, for workers in other folders."""
    kind, _, path = recipe.calibration.source.partition(":")
    if kind != "file":
        return recipe
    part = recipe.calibration.model_copy(update={"source": f"file:{user_path(path).absolute()}"})
    return recipe.model_copy(update={"calibration": part})


def _order(request: Request, cell: Cell, recipe: Recipe | None, source: str, files: str) -> Order:
    tasks = tuple(task for task in TASKS if task in request.tasks)
    settings = recipe.model_dump(mode="json") if recipe else None
    text = source_digest(recipe.calibration.source) if recipe and cell.states else ""
    threads, sizes, items = request.grid.threads, request.sizes, request.task
    asked = hashlib.sha256(items.read_bytes()).hexdigest() if items else ""
    decides = [measuring_code(), files, text, asked, vars(cell), settings, tasks, asdict(sizes), threads]
    return Order(
        cell=cell,
        source=source,
        recipe=_anywhere(recipe) if recipe else None,
        tasks=tasks,
        sizes=sizes,
        task=items.absolute() if items else None,
        threads=threads,
        code=measuring_code(),
        fingerprint=digest_of(decides),
    )


def _measure_missing(plan: Plan, folder: StudyFolder, engine: str, jobs: int | None, report: Progress) -> None:
    missing = [order for order in plan.orders if folder.outcome(order.cell, order.fingerprint) is None]
    done = len(plan.orders) - len(missing)
    if done:
        report.note(f"{done} of {len(plan.orders)} cells done before, reused")
    for cell, reason in plan.impossible:
        report.note(f"{cell.label}: not possible: {reason}")
    if not missing:
        return
    if engine == "local":  # nobody knows here what the machines of a cluster have
        check_memory(missing, plan.elements, jobs or 1)
    with report.stage("study") as stage:
        stage.advance(done, len(plan.orders), "cells")
        for order, outcome in _measured(missing, engine, jobs):
            folder.keep(order.cell, outcome)
            done += 1
            stage.advance(done, len(plan.orders), "cells")
            seconds = sum(outcome["seconds"].values())
            report.note(f"{order.cell.label}: {outcome.get('failed', 'done')} ({seconds:.1f} s)")


@contextmanager
def _scratch(folder: Path) -> Iterator[None]:
    """Temporary files of cells in this machine's processes lie in the study's folder, and none after a kill.

    A model may be too large for the system's folder, which is often in memory. Workers of a cluster have their own.
    """
    place = folder / SCRATCH
    before, variable = tempfile.tempdir, os.environ.get("TMPDIR")
    with os_faults(f"cannot write in {folder}"):
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
    tempfile.tempdir = os.environ["TMPDIR"] = str(place)
    try:
        yield
    finally:
        tempfile.tempdir = before
        if variable is None:
            del os.environ["TMPDIR"]
        else:
            os.environ["TMPDIR"] = variable
        shutil.rmtree(place, ignore_errors=True)


def _measured(orders: Sequence[Order], engine: str, jobs: int | None) -> Iterator[tuple[Order, dict[str, Any]]]:
    return ENGINES[engine](measure, orders, jobs)


def _kept(folder: StudyFolder, order: Order) -> dict[str, Any]:
    outcome = folder.outcome(order.cell, order.fingerprint)
    assert outcome is not None, f"{order.cell.label} was measured and is gone"
    return outcome


def _write(
    request: Request, measured: Sequence[tuple[Cell, dict[str, Any]]], plan: Plan, folder: Path
) -> dict[str, Any]:
    """study.json, study.md and the pictures: they hold no time and no place, so the same cells give the same bytes."""
    recipes = {order.cell: request.grid.recipe(order.cell) for order in plan.orders if order.recipe is not None}
    rows = summary.rows(measured, plan.impossible, recipes)
    table = summary.as_table(rows)
    content: dict[str, Any] = {
        "made_with": {"dllmc": VERSION, "python": platform.python_version(), **made_with()},
        "code": measuring_code(),
        "threads": request.grid.threads,
        "models": plan.models,
        "sizes": asdict(request.sizes),
        "settings": list(request.grid.sets),
        "task": request.task.name if request.task else "built-in problems",
        "rows": table,
        "findings": findings(rows),
    }
    write_json(folder / STUDY, content)
    pictures = plots.draw(table, folder)
    write_bytes(folder / TABLE, markdown(content, pictures).encode())
    return content
