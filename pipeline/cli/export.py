"""`dllmc export MODEL`, and each of its stages as a command of its own."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.folder import STAGES

if TYPE_CHECKING:
    from pipeline.recipe import Recipe

DEFAULT_RECIPE = "rtn-w8a8"

RUN_OPTIONS = (
    click.option("--set", "sets", multiple=True, metavar="A.B=VALUE", help="Change one recipe key (repeatable)."),
    click.option("--force", is_flag=True, help="Replace an existing bundle, repeat finished stages."),
    click.option(
        "--validate",
        "validation",
        type=click.Choice(["on", "off"]),
        default="on",
        show_default=True,
        help="off publishes a bundle marked unvalidated.",
    ),
    click.option(
        "--workers",
        type=click.IntRange(1, 256),
        default=1,
        show_default=True,
        help="Batches calibrated at a time, each on the recipe's threads; changes no byte of the result.",
    ),
    click.option(
        "--cache",
        type=click.Choice(["ram", "disk"]),
        default="ram",
        show_default=True,
        help="Where calibration keeps the inputs of a block; disk is DIR.work/cache.",
    ),
    click.option("--json", "as_json", is_flag=True, help="Print one JSON object per event."),
)


def _run_options(function: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(RUN_OPTIONS):
        function = option(function)
    return function


@click.command(epilog="Example: dllmc export builtin:tiny-llada --recipe rtn-w4a4 -o out")
@click.argument("model", metavar="MODEL")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Bundle folder  [default: exported/MODEL-RECIPE]")
@click.option("--recipe", "recipe_name", metavar="NAME|FILE", default=DEFAULT_RECIPE, show_default=True)
@click.option("--from", "first", metavar="STAGE", type=click.Choice(STAGES), help="Repeat from this stage on.")
@click.option("--until", "last", metavar="STAGE", type=click.Choice(STAGES), help="Stop after this stage.")
@_run_options
def command(
    model: str,
    output: Path | None,
    recipe_name: str,
    first: str | None,
    last: str | None,
    sets: tuple[str, ...],
    **given: Any,
) -> None:
    """Compile a model into a validated bundle.

    MODEL is builtin:NAME or a checkpoint folder (`dllmc models`). Runs calibrate, quantize, lower, validate, build and
    bundle. Repeat an interrupted command to resume it.
    """
    if first and last and STAGES.index(first) > STAGES.index(last):
        raise click.UsageError(f"--from {first} comes after --until {last}; the order is {', '.join(STAGES)}")
    from pipeline.recipe_file import load_recipe

    recipe = load_recipe(recipe_name, sets)
    target = output or default_output(model, recipe.name)
    _export(model, target, recipe, first, last, **given)


def default_output(model: str, recipe: str) -> Path:
    """`exported/<model>-<recipe>`; a folder gives its own name."""
    name = model.rpartition(":")[2] if model.startswith("builtin:") else Path(model).resolve().name
    return Path("exported") / f"{re.sub('[^A-Za-z0-9._-]', '_', name) or 'model'}-{recipe}"


def _export(
    model: str,
    output: Path,
    recipe: Recipe,
    first: str | None,
    last: str | None,
    *,
    force: bool,
    validation: str,
    workers: int,
    cache: str,
    as_json: bool,
) -> None:
    from pipeline.progress import Progress

    recipe.check_exportable()
    report = Progress(json=as_json)
    from pipeline import stages

    made = stages.export(
        model,
        output,
        recipe,
        first=first,
        last=last,
        force=force,
        validate=validation == "on",
        workers=workers,
        cache_on_disk=cache == "disk",
        report=report,
    )
    if as_json:
        click.echo(json.dumps({"event": "result", "folder": str(made), "stage": last or STAGES[-1]}))
    elif last in (None, STAGES[-1]):
        click.echo(f'{made}   next: dllmc run {shlex.quote(str(made))} --prompt "..."')
    else:
        following = STAGES[STAGES.index(last) + 1]
        click.echo(f"{made}   next: dllmc {following} {shlex.quote(str(output))}")


def _stage_command(stage: str, summary: str) -> click.Command:
    """One stage on the work folder of DIR, with the model and recipe that are recorded there."""

    @click.command(name=stage, help=f"{summary}\n\nWorks in DIR.work, on what the stages before left there.")
    @click.argument("output", metavar="DIR", type=click.Path(path_type=Path))
    @click.option("--model", metavar="MODEL", help="Start here: builtin:NAME or a checkpoint folder.")
    @click.option("--recipe", "recipe_name", metavar="NAME|FILE", help="Instead of the recipe recorded in DIR.work.")
    @_run_options
    def run_stage(
        output: Path,
        model: str | None,
        recipe_name: str | None,
        sets: tuple[str, ...],
        **given: Any,
    ) -> None:
        chosen, recipe = _recorded(output, model, recipe_name, sets)
        _export(chosen, output, recipe, stage, stage, **given)

    return run_stage


def _recorded(output: Path, model: str | None, recipe_name: str | None, sets: tuple[str, ...]) -> tuple[str, Recipe]:
    from pipeline.folder import read_job
    from pipeline.recipe_file import load_recipe, parse_recipe

    if model is not None:
        return model, load_recipe(recipe_name or DEFAULT_RECIPE, sets)
    job = read_job(output)
    if recipe_name is not None:
        return job["model"], load_recipe(recipe_name, sets)
    return job["model"], parse_recipe(job["recipe"], f"the recipe in {output}.work", sets)


calibrate = _stage_command("calibrate", "Stage 1 of export: collect statistics.")
quantize = _stage_command("quantize", "Stage 2 of export: rewrite the graph, pack the weights.")
lower = _stage_command("lower", "Stage 3 of export: translate the graph to ONNX.")
validate = _stage_command("validate", "Stage 4 of export: prove the ONNX model.")
build = _stage_command("build", "Stage 5 of export: build the engine.")
bundle = _stage_command("bundle", "Stage 6 of export: assemble and publish the bundle.")
