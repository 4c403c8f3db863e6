"""`dllmc chat DIR`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.cli.generation import chosen, generation_options

if TYPE_CHECKING:
    from pipeline.runner import GenerateOptions, Runner

PROMPT = "> "


@click.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--visual", is_flag=True, help="Show the canvas filling in, confidence by colour.")
@click.option("--system", metavar="TEXT", help="What the assistant is told before the first turn.")
@generation_options
@click.option("--threads", type=click.IntRange(min=1), help="Cores to use [all].")
def command(folder: Path, visual: bool, system: str | None, threads: int | None, **given: Any) -> None:
    """Talk with a model: a line is a turn, end-of-file (Ctrl-D) ends the conversation.

    The bundle must carry the model's chat template. NO_COLOR in the environment turns the colours off.

    \b
    dllmc chat exported/llada-rtn-w4a4 --visual --gen-length auto
    """
    if visual and not sys.stderr.isatty():
        raise click.UsageError("--visual draws on a terminal, and standard error is none; leave it out")
    from pipeline.progress import Progress
    from pipeline.runner import Runner

    with Progress().stage("load", brief=True) as stage:
        runner = Runner(folder, threads=threads, on_bytes=stage.advance_bytes)
    runner.chat_template()  # before anything is asked of the user
    options = chosen(runner.settings, given)
    messages = [] if system is None else [{"role": "system", "content": system}]
    for line in _lines():
        messages.append({"role": "user", "content": line})
        answer = _show(runner, messages, options, visual=visual)
        messages.append({"role": "assistant", "content": answer})


def _lines() -> Iterator[str]:
    """What the user says, empty lines left out."""
    asked = sys.stdin.isatty()
    while True:
        try:
            line = input(PROMPT) if asked else input()
        except EOFError:
            if asked:
                click.echo()
            return
        if line.strip():
            yield line


def _show(runner: Runner, messages: list[dict[str, str]], options: GenerateOptions, *, visual: bool) -> str:
    """Print the next turn, block by block, or drawn while it is written."""
    from pipeline.runner import Completion, Piece, Step
    from pipeline.runner.view import CanvasView, printable

    settings = runner.settings
    view = CanvasView(sys.stderr, mask_id=settings.mask_id, eos_id=settings.eos_id, decode=runner.decode)
    shown = printable if sys.stdout.isatty() else str
    text = ""
    try:
        with closing(runner.stream(messages, options)) as events:
            for event in events:
                if isinstance(event, Step) and visual:
                    view(event)
                elif isinstance(event, Piece) and not visual:
                    click.echo(shown(event.text), nl=False)
                elif isinstance(event, Completion):
                    text = event.text
    finally:
        if visual:
            view.erase()
    click.echo(shown(text) if visual else "")
    return text
