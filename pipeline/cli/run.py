"""`dllmc run DIR`."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.cli.generation import chosen, generation_options

if TYPE_CHECKING:
    from pipeline.progress import Progress
    from pipeline.runner import Runner


@click.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--prompt", metavar="TEXT", help="What to answer.")
@generation_options
@click.option("--threads", type=click.IntRange(min=1), help="Cores to use [all].")
@click.option("--self-test", is_flag=True, help="Replay the recorded passes of the bundle on this machine.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    folder: Path, prompt: str | None, threads: int | None, self_test: bool, as_json: bool, **given: Any
) -> None:
    """Generate text from a bundle; on a terminal the canvas is shown filling in.

    \b
    dllmc run exported/tiny-llada-rtn-w8a8 --prompt "547+985="
    dllmc run exported/tiny-llada-rtn-w8a8 --self-test
    """
    if (prompt is None) != self_test:
        raise click.UsageError("pass either --prompt TEXT or --self-test")
    from pipeline.progress import Progress
    from pipeline.runner import Runner

    progress = Progress(json=as_json)
    with progress.stage("load", brief=True) as stage:
        runner = Runner(folder, threads=threads, on_bytes=stage.advance_bytes)
    if prompt is None:
        _replay(runner, folder, progress, as_json)
    else:
        _answer(runner, prompt, as_json, given)


def _answer(runner: Runner, prompt: str, as_json: bool, given: dict[str, Any]) -> None:
    from pipeline.runner.view import CanvasView, printable

    settings = runner.settings
    options = chosen(settings, given)
    view = None
    if sys.stderr.isatty() and not as_json:
        view = CanvasView(sys.stderr, mask_id=settings.mask_id, eos_id=settings.eos_id, decode=runner.decode)
    started = time.monotonic()
    try:
        (completion,) = runner.generate_text([prompt], options, on_step=view)
    finally:
        if view is not None:
            view.erase()
    seconds = time.monotonic() - started
    result = completion.result
    if as_json:
        body = {
            "text": completion.text,
            "ids": result.ids,
            "finish_reason": result.finish_reason,
            "prompt_tokens": completion.prompt_tokens,
            "nfe": result.nfe,
            "seconds": round(seconds, 4),
        }
        click.echo(json.dumps(body, ensure_ascii=False))
        return
    click.echo(printable(completion.text) if sys.stdout.isatty() else completion.text)
    if view is not None:
        tokens = len(result.ids)
        click.echo(f"{tokens} tokens, {result.nfe} passes, {seconds:.2f} s, {tokens / seconds:.1f} tokens/s", err=True)


def _replay(runner: Runner, folder: Path, progress: Progress, as_json: bool) -> None:
    from pipeline.folder import GOLDEN
    from pipeline.runner.self_test import self_test

    with progress.stage("self-test", brief=True) as stage:
        replays = self_test(
            runner.session, folder / GOLDEN, on_replay=lambda done, total: stage.advance(done, total, "passes")
        )
    worst = {name: max(replay.differences[name] for replay in replays) for name in replays[0].differences}
    if as_json:
        click.echo(json.dumps({"passes": len(replays), "differences": worst}))
    else:
        figures = ", ".join(f"{name} {value:.2g}" for name, value in worst.items())
        click.echo(f"{len(replays)} of {len(replays)} recorded passes replayed; greatest differences: {figures}")
