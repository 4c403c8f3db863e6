"""`dllmc bench DIR`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.cli.generation import chosen, described, options_but

if TYPE_CHECKING:
    from pipeline.runner import Runner

COLUMNS = {
    "policy": "policy",
    "block_length": "block",
    "batch_size": "batch",
    "full_pass_ms": "full pass ms",
    "block_pass_ms": "block pass ms",
    "host_ms_per_step": "host ms/step",
    "transfer_bytes_per_step": "bytes/step",
    "tpf": "TPF",
    "tokens_per_second": "tokens/s",
}


def _words(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[str, ...]:
    return tuple(word.strip() for word in (value or "").split(",") if word.strip())


def _numbers(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, ...]:
    return tuple(click.IntRange(min=1)(word, parameter, context) for word in _words(context, parameter, value))


@click.command(name="bench")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--policies", metavar="A,B", callback=_words, help="Policies to compare [bundle's].")
@click.option("--block-lengths", metavar="N,M", callback=_numbers, help="Block lengths to compare [bundle's].")
@click.option(
    "--batch-sizes", metavar="N,M", callback=_numbers, default="1", show_default=True, help="Prompts at a time."
)
@click.option("--task", metavar="FILE.jsonl", type=click.Path(path_type=Path), help="Lines whose prompts are answered.")
@click.option("--prompts", type=click.IntRange(min=1), default=8, show_default=True, help="How many prompts.")
@click.option(
    "--prompt-length", type=click.IntRange(min=1), default=32, show_default=True, help="Of random ids, without --task."
)
@click.option("--repeats", type=click.IntRange(min=1), default=3, show_default=True, help="Medians are over these.")
@options_but("policy", "block_length")
@click.option("--threads", type=click.IntRange(min=1), help="Cores to use [all].")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    folder: Path,
    policies: tuple[str, ...],
    block_lengths: tuple[int, ...],
    batch_sizes: tuple[int, ...],
    task: Path | None,
    prompts: int,
    prompt_length: int,
    repeats: int,
    threads: int | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Measure the speed of a bundle on this machine: passes, the host between them, tokens per second.

    Tokens are counted up to the first end-of-text, and the time includes the prefill. Tokens per forward (TPF) mean
    something for prompts like yours (--task) only; random ids are good for the times of passes.

    \b
    dllmc bench exported/tiny-llada-rtn-w8a8 --policies quota,threshold --block-lengths 8,32 --json
    """
    from pipeline.inspection import table
    from pipeline.progress import Progress
    from pipeline.runner import Runner
    from pipeline.runner.benchmark import benchmark, cases_of

    progress = Progress(json=as_json)
    with progress.stage("load", brief=True) as stage:
        runner = Runner(folder, threads=threads, on_bytes=stage.advance_bytes)
    options = chosen(runner.settings, given)
    asked = _prompts(runner, task, prompts, prompt_length)
    with progress.stage("bench", brief=True) as stage:
        found = benchmark(
            runner.engine,
            asked,
            list(cases_of(options, policies, block_lengths, batch_sizes or (1,))),
            repeats=repeats,
            decode=runner.decode,
            on_run=lambda done, total: stage.advance(done, total, "runs"),
        )
    source = "random ids" if task is None else task.name
    if as_json:
        click.echo(json.dumps({**found, "prompts_of": source, "threads": threads, "options": described(options)}))
    else:
        click.echo("\n".join(table(list(COLUMNS.values()), [_row(case) for case in found["cases"]])))
        click.echo(
            f"{found['prompts']} prompts of {source}, medians of {repeats}; tokens/s: {found['definition']}; "
            f"peak memory {found['peak_memory_bytes'] / 1e6:.1f} MB; {described(options)}"
        )


def _row(case: dict[str, Any]) -> list[object]:
    """The cells of one case; empty for a kind of pass that it never took."""
    values = [case[key] for key in COLUMNS]
    return ["" if value is None else f"{value:g}" if isinstance(value, float) else value for value in values]


def _prompts(runner: Runner, task: Path | None, count: int, length: int) -> list[list[int]]:
    from pipeline.evaluation import read_task
    from pipeline.runner.benchmark import random_prompts

    if task is None:
        return random_prompts(runner.settings, count, length)
    return [runner.encode(item.prompt) for item in read_task(task, count)]
