"""`dllmc run DIR`."""

from __future__ import annotations

import json
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.cli.generation import chosen, generation_options

if TYPE_CHECKING:
    from pipeline.progress import Progress
    from pipeline.runner import Completion, Runner


@click.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--prompt", metavar="TEXT", help="What to answer.")
@click.option("--infill", metavar="TEXT", help="A text whose <mask:N> are gaps of N tokens to write.")
@generation_options
@click.option("--threads", type=click.IntRange(min=1), help="Cores to use [all].")
@click.option("--self-test", is_flag=True, help="Replay the recorded passes of the bundle on this machine.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    folder: Path,
    prompt: str | None,
    infill: str | None,
    threads: int | None,
    self_test: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Generate text from a bundle; on a terminal the canvas is shown filling in.

    \b
    dllmc run exported/tiny-llada-rtn-w8a8 --prompt "547+985="
    dllmc run exported/tiny-llada-rtn-w8a8 --infill "547+<mask:3>=1532"
    dllmc run exported/tiny-llada-rtn-w8a8 --self-test
    """
    if (prompt is not None) + (infill is not None) + self_test != 1:
        raise click.UsageError("pass one of --prompt TEXT, --infill TEXT and --self-test")
    from pipeline.progress import Progress
    from pipeline.runner import Runner

    progress = Progress(json=as_json)
    with progress.stage("load", brief=True) as stage:
        runner = Runner(folder, threads=threads, on_bytes=stage.advance_bytes)
    if self_test:
        _replay(runner, folder, progress, as_json)
        return
    options = chosen(runner.settings, given)
    watched = sys.stderr.isatty() and not as_json
    if infill is not None:
        completion = runner.infill(infill, options)
    elif watched:
        completion = _watch(runner, prompt or "", options)
    else:
        (completion,) = runner.generate([prompt or ""], options)
    _tell(completion, as_json, watched)


def _watch(runner: Runner, prompt: str, options: Any) -> Completion:
    """The canvas on the terminal while it fills in."""
    from pipeline.runner import Completion, Step
    from pipeline.runner.view import CanvasView

    settings = runner.settings
    view = CanvasView(sys.stderr, mask_id=settings.mask_id, eos_id=settings.eos_id, decode=runner.decode)
    try:
        with closing(runner.stream(prompt, options)) as events:
            for event in events:
                if isinstance(event, Step):
                    view(event)
                elif isinstance(event, Completion):
                    completion = event
    finally:
        view.erase()
    return completion


def _tell(completion: Completion, as_json: bool, watched: bool) -> None:
    from pipeline.runner.view import printable

    result = completion.result
    if as_json:
        body = {
            "text": completion.text,
            "ids": result.ids,
            "finish_reason": result.finish_reason,
            "prompt_tokens": completion.prompt_tokens,
            "nfe": result.nfe,
            "nfe_full": result.nfe_full,
            "nfe_block": result.nfe_block,
            "tpf": round(result.tpf, 4),
            "tokens_per_second": round(completion.tokens_per_second, 3),
            "seconds": round(completion.seconds, 4),
            "agreement": result.agreement,
            "step_map": result.step_map,
            "logprobs": [round(value, 6) for value in result.logprobs],
        }
        click.echo(json.dumps(body, ensure_ascii=False))
        return
    click.echo(printable(completion.text) if sys.stdout.isatty() else completion.text)
    if watched:
        agreement = "" if result.agreement is None else f", agreement {result.agreement:.1%}"
        click.echo(
            f"{len(result.ids)} tokens, {result.nfe} passes ({result.nfe_full} full), {completion.seconds:.2f} s, "
            f"{completion.tokens_per_second:.1f} tokens/s{agreement}",
            err=True,
        )


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
