"""The study from question to folder: plan the cells, measure those that are missing, write table and pictures."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.bundle import made_with
from pipeline.calibration.sources import source_digest
from pipeline.errors import EnvironmentFault, UsageFault
from pipeline.fingerprint import digest_of, model_digest
from pipeline.folder import write_bytes, write_json
from pipeline.models import resolve
from pipeline.models.checkpoint import open_checkpoint
from pipeline.progress import Progress
from pipeline.quantize import check_format
from pipeline.recipe import Recipe
from pipeline.study import plots, summary
from pipeline.study.engines import ENGINES
from pipeline.study.findings import findings
from pipeline.study.grid import FULL, Cell, Grid, known
from pipeline.study.measure import Order, measure, measuring_code
from pipeline.study.store import StudyFolder
from pipeline.study.subject import Sizes
from pipeline.study.table import markdown
from pipeline.study.tasks import TASKS
from pipeline.version import VERSION

STUDY, TABLE = "study.json", "study.md"


@dataclass(frozen=True, kw_only=True)
class Request:
    """All that decides the numbers; how many processes measure them does not."""

    models: tuple[str, ...]
    grid: Grid
    tasks: tuple[str, ...]
    sizes: Sizes


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The models, the cells in their order, and those that cannot be, with the reason."""

    models: dict[str, str]  # with the digest of their files
    orders: tuple[Order, ...]
    impossible: tuple[tuple[Cell, str], ...]


def study(request: Request, output: Path, *, engine: str = "local", jobs: int = 1, report: Progress) -> dict[str, Any]:
    """Measure what is missing in the folder `output`; returns what study.json says.

    Raises UsageFault for names that are none and where no cell is possible, EnvironmentFault for a missing package.
    """
    known([engine], ENGINES, "engine", "--engine")
    _require_matplotlib()
    plan = make_plan(request)
    with StudyFolder(output) as folder:
        _measure_missing(plan, folder, engine, jobs, report)
        measured = [(order.cell, _kept(folder, order)) for order in plan.orders]
        return _write(request, measured, plan, folder.path)


def make_plan(request: Request) -> Plan:
    """Every cell of the grid on every model, with its recipe checked against method and model."""
    request.grid.check()
    known(request.tasks, TASKS, "task", "--tasks")
    orders: list[Order] = []
    impossible: list[tuple[Cell, str]] = []
    models: dict[str, str] = {}
    for model in dict.fromkeys(request.models):
        checkpoint = open_checkpoint(resolve(model))
        files = models[model] = model_digest(checkpoint)
        source = model if model.startswith("builtin:") else str(checkpoint.folder.absolute())
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
            orders.append(_order(request, cell, recipe, source, files))
    if impossible and all(order.recipe is None for order in orders):
        raise UsageFault(f"no cell of this study is possible: {impossible[0][1]}")
    return Plan(models=models, orders=tuple(orders), impossible=tuple(impossible))


def _order(request: Request, cell: Cell, recipe: Recipe | None, source: str, files: str) -> Order:
    tasks = tuple(task for task in TASKS if task in request.tasks)
    settings = recipe.model_dump(mode="json") if recipe else None
    text = source_digest(recipe.calibration.source) if recipe and cell.states else ""
    threads, sizes = request.grid.threads, request.sizes
    decides = [measuring_code(), files, text, vars(cell), settings, tasks, asdict(sizes), threads]
    return Order(
        cell=cell,
        source=source,
        recipe=recipe,
        tasks=tasks,
        sizes=sizes,
        threads=threads,
        code=measuring_code(),
        fingerprint=digest_of(decides),
    )


def _measure_missing(plan: Plan, folder: StudyFolder, engine: str, jobs: int, report: Progress) -> None:
    missing = [order for order in plan.orders if folder.outcome(order.cell, order.fingerprint) is None]
    done = len(plan.orders) - len(missing)
    if done:
        report.note(f"{done} of {len(plan.orders)} cells done before, reused")
    for cell, reason in plan.impossible:
        report.note(f"{cell.label}: not possible: {reason}")
    if not missing:
        return
    with report.stage("study") as stage:
        stage.advance(done, len(plan.orders), "cells")
        for order, outcome in _measured(missing, engine, jobs):
            folder.keep(order.cell, outcome)
            done += 1
            stage.advance(done, len(plan.orders), "cells")
            seconds = sum(outcome["seconds"].values())
            report.note(f"{order.cell.label}: {outcome.get('failed', 'done')} ({seconds:.1f} s)")


def _measured(orders: Sequence[Order], engine: str, jobs: int) -> Iterator[tuple[Order, dict[str, Any]]]:
    return ENGINES[engine](measure, orders, jobs)


def _kept(folder: StudyFolder, order: Order) -> dict[str, Any]:
    outcome = folder.outcome(order.cell, order.fingerprint)
    assert outcome is not None, f"{order.cell.label} was measured and is gone"
    return outcome


def _write(
    request: Request, measured: Sequence[tuple[Cell, dict[str, Any]]], plan: Plan, folder: Path
) -> dict[str, Any]:
    """study.json, study.md and the pictures: they hold no time and no place, so the same cells give the same bytes."""
    recipes = {order.cell: order.recipe for order in plan.orders if order.recipe is not None}
    rows = summary.rows(measured, plan.impossible, recipes)
    table = summary.as_table(rows)
    content: dict[str, Any] = {
        "made_with": {"dllmc": VERSION, "python": platform.python_version(), **made_with()},
        "code": measuring_code(),
        "threads": request.grid.threads,
        "models": plan.models,
        "sizes": asdict(request.sizes),
        "settings": list(request.grid.sets),
        "rows": table,
        "findings": findings(rows),
    }
    write_json(folder / STUDY, content)
    pictures = plots.draw(table, folder)
    write_bytes(folder / TABLE, markdown(content, pictures).encode())
    return content


def _require_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as fault:
        raise EnvironmentFault(f"a study draws with matplotlib ({fault}); pip install 'dllmc[study]'") from fault
