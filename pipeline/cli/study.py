"""`dllmc study MODEL...`."""

from __future__ import annotations

import json
from pathlib import Path

import click


def _words(context: click.Context, parameter: click.Parameter, value: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in value.split(",") if word.strip())


SIZES = (
    click.option("--problems", type=click.IntRange(min=1), default=500, show_default=True, help="Of exact match."),
    click.option("--tokens", type=click.IntRange(min=1), default=20000, show_default=True, help="Masked, of NLL."),
    click.option("--questions", type=click.IntRange(min=1), default=200, show_default=True, help="Of choice."),
    click.option(
        "--masks", type=click.IntRange(min=1), default=8, show_default=True, help="Masks drawn for each option."
    ),
    click.option("--trajectories", type=click.IntRange(min=1), default=32, show_default=True, help="Prompts followed."),
)


@click.command(epilog="Example: dllmc study builtin:tiny-llada --methods rtn,gptq --bits w4a16,w4a4 -o out")
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@click.option("--methods", metavar="A,B", required=True, callback=_words, help="Quantisation methods.")
@click.option("--bits", metavar="A,B", required=True, callback=_words, help="Formats, such as w8a8,w4a16,w4a4.")
@click.option(
    "--tasks", metavar="A,B", callback=_words, default="nll,agreement,match,choice,trajectory", show_default=True
)
@click.option(
    "--task",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Ask its items (as `dllmc eval` does), not the built-in problems.",
)
@click.option("--states", metavar="A,B", callback=_words, default="noised", show_default=True, help="noised, clean.")
@click.option("--seeds", metavar="N[,BITS=N]", default="1", show_default=True, help="Calibration and rotation draws.")
@click.option("-o", "--output", metavar="DIR", required=True, type=click.Path(path_type=Path), help="Study folder.")
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    help="Cells at a time; without it one, with ray what the cluster has room for.",
)
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True, help="Of each cell.")
@click.option("--engine", metavar="NAME", default="local", show_default=True, help="local, or ray (a cluster).")
@click.option("--set", "sets", multiple=True, metavar="A.B=VALUE", help="Change one key of every recipe (repeatable).")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per event.")
def command(
    models: tuple[str, ...],
    methods: tuple[str, ...],
    bits: tuple[str, ...],
    tasks: tuple[str, ...],
    task: Path | None,
    states: tuple[str, ...],
    seeds: str,
    output: Path,
    jobs: int | None,
    threads: int,
    engine: str,
    sets: tuple[str, ...],
    as_json: bool,
    **sizes: int,
) -> None:
    """Compare quantisation methods on models, task by task.

    MODEL is builtin:NAME or a checkpoint folder. Writes study.json, study.md and pictures into DIR. Repeat an
    interrupted command to go on: finished cells are kept.
    """
    from pipeline.progress import Progress
    from pipeline.study.grid import Grid, parse_seeds
    from pipeline.study.run import STUDY, TABLE, Request, study
    from pipeline.study.subject import Sizes

    grid = Grid(methods=methods, bits=bits, states=states, seeds=parse_seeds(seeds, bits), sets=sets, threads=threads)
    request = Request(models=models, grid=grid, tasks=tasks, sizes=Sizes(**sizes), task=task)
    study(request, output, engine=engine, jobs=jobs, report=Progress(json=as_json))
    if as_json:
        click.echo(json.dumps({"event": "result", "folder": str(output), "table": TABLE, "figures": STUDY}))
    else:
        click.echo(f"{output / TABLE}")


for option in reversed(SIZES):
    command = option(command)
