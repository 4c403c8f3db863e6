"""Words to calls: the group `dllmc`, whose commands are imported when they are used. No logic here."""

from __future__ import annotations

import difflib
import importlib
from dataclasses import dataclass

import click

from pipeline.version import VERSION


@dataclass
class Invocation:
    """What one command line decided for all commands."""

    debug: bool = False
    command: str = ""


@dataclass(frozen=True)
class Entry:
    """Where a command is found, and its line in `dllmc --help` (which must not import it)."""

    module: str
    attribute: str
    summary: str


COMMANDS: dict[str, Entry] = {
    "export": Entry("pipeline.cli.export", "command", "Compile a model into a validated bundle."),
    "run": Entry("pipeline.cli.run", "command", "Generate text from a bundle."),
    "chat": Entry("pipeline.cli.chat", "command", "Talk with a model."),
    "score": Entry("pipeline.cli.score", "command", "Say how likely an answer is."),
    "bench": Entry("pipeline.cli.benchmark", "command", "Measure the speed of a bundle on this machine."),
    "eval": Entry("pipeline.cli.evaluate", "command", "Measure exact match of a model or a bundle on a task."),
    "outliers": Entry("pipeline.cli.outliers", "command", "Show what stands out in the inputs of every linear."),
    "study": Entry("pipeline.cli.study", "command", "Compare quantisation methods on models, task by task."),
    "verify": Entry("pipeline.cli.verify", "command", "Find changed, missing and extra files of a bundle."),
    "inspect": Entry("pipeline.cli.inspect", "command", "Show formats and sizes of a bundle without loading it."),
    "recipe": Entry("pipeline.cli.recipe", "command", "Show the built-in recipes and what they resolve to."),
    "models": Entry("pipeline.cli.models", "command", "List the supported families and the built-in models."),
    "calibrate": Entry("pipeline.cli.export", "calibrate", "Stage 1 of export: collect statistics."),
    "quantize": Entry("pipeline.cli.export", "quantize", "Stage 2 of export: rewrite the graph, pack the weights."),
    "lower": Entry("pipeline.cli.export", "lower", "Stage 3 of export: translate the graph to ONNX."),
    "validate": Entry("pipeline.cli.export", "validate", "Stage 4 of export: prove the ONNX model."),
    "build": Entry("pipeline.cli.export", "build", "Stage 5 of export: build the engine."),
    "bundle": Entry("pipeline.cli.export", "bundle", "Stage 6 of export: assemble and publish the bundle."),
}


def _remember_debug(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    invocation = context.find_object(Invocation)
    if value and invocation is not None:
        invocation.debug = True


def debug_option() -> click.Option:
    """`--debug`, the same for every command."""
    return click.Option(
        ["--debug"],
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=_remember_debug,
        help="Show the traceback of an error.",
    )


def accept_debug(command: click.Command) -> None:
    """Give a command, and every command inside it, the option `--debug`."""
    if not any(parameter.name == "debug" for parameter in command.params):
        command.params.append(debug_option())
    if isinstance(command, click.Group):
        for inner in command.commands.values():
            accept_debug(inner)


class Commands(click.Group):
    """A group over `COMMANDS`; a wrong name is answered with the nearest one."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        entry = COMMANDS.get(cmd_name)
        if entry is None:
            return None
        command = getattr(importlib.import_module(entry.module), entry.attribute)
        assert isinstance(command, click.Command)
        accept_debug(command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0].replace("_", "-") not in COMMANDS and not args[0].startswith("-"):
            near = difflib.get_close_matches(args[0], COMMANDS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "`dllmc --help` lists the commands"
            ctx.fail(f"no command {args[0]!r}; {hint}")
        name, command, rest = super().resolve_command(ctx, args)
        invocation = ctx.find_object(Invocation)
        if invocation is not None:
            invocation.command = name or ""
        return name, command, rest

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.summary) for name, entry in COMMANDS.items()])


EPILOG = 'Example: dllmc export builtin:tiny-llada --recipe rtn-w8a8 -o out && dllmc run out --prompt "547+985="'

group = Commands(
    name="dllmc",
    help="Compile diffusion language models (LLaDA, Dream) into small, validated bundles.",
    epilog=EPILOG,
    context_settings={
        "token_normalize_func": lambda word: word.replace("_", "-"),
        "help_option_names": ["-h", "--help"],
        "max_content_width": 100,
    },
    params=[debug_option()],
    no_args_is_help=True,
)
click.version_option(VERSION, prog_name="dllmc", message="%(prog)s %(version)s")(group)
