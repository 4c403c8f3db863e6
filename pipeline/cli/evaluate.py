"""`dllmc eval MODEL|BUNDLE`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from pipeline.cli.generation import chosen, described, generation_options

FILE = click.Path(path_type=Path)
BATCH_SIZE = 32


@click.command(name="eval")
@click.argument("model", metavar="MODEL|BUNDLE")
@click.option("--task", metavar="FILE.jsonl", required=True, type=FILE, help="One {prompt, answer} object a line.")
@click.option("--limit", type=click.IntRange(min=1), help="Only the first N lines.")
@generation_options
@click.option("--batch-size", type=click.IntRange(min=1), help="Prompts at a time [32; with --exact 1].")
@click.option("--threads", type=click.IntRange(min=1), help="Cores to use [all].")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    model: str, task: Path, limit: int | None, batch_size: int | None, threads: int | None, as_json: bool, **given: Any
) -> None:
    """Measure exact match of a model or a bundle on a task.

    A checkpoint folder (or builtin:NAME) runs at full precision in torch, a bundle in ONNX Runtime. An answer is right
    when the text generated before the end-of-text token equals the expected one, white space aside. --exact turns the
    cache and batching off.
    """
    from pipeline.evaluation import evaluate, open_model, read_task
    from pipeline.progress import Progress

    items = read_task(task, limit)
    progress = Progress()  # notes under --json too: they go to standard error
    opening = Progress(json=as_json)
    with opening.stage("load", brief=True) as stage:
        opened = open_model(model, threads=threads, on_bytes=stage.advance_bytes)
    options = chosen(opened.settings, given)
    with progress.stage("eval") as stage:
        stage.advance(0, len(items), "problems")
        score = evaluate(
            opened,
            items,
            options,
            batch_size=batch_size or (1 if options.exact else BATCH_SIZE),
            on_done=lambda done: stage.advance(done, len(items), "problems"),
        )
        stage.finish(f"exact match {score.exact_match:.1%}")
    if score.unreachable:
        progress.note(
            f"{score.unreachable} answers are longer than gen-length {options.gen_length}; they count as wrong"
        )
    if as_json:
        click.echo(json.dumps({**asdict(score), "options": asdict(options)}))
    else:
        click.echo(
            f"exact match {score.exact_match:.4f} on {score.count} problems, {score.nfe:.2f} passes a problem "
            f"({score.nfe_full:.2f} full), TPF {score.tpf:.2f}, {score.tokens_per_second:.1f} tokens/s, "
            f"{score.seconds:.1f} s; {described(options)}"
        )
