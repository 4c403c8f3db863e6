"""The options of generation that all commands share; those not given keep the bundle's defaults."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from pipeline.runner import GenerateOptions, Settings

Command = TypeVar("Command", bound=Callable[..., Any])

GROWING = "auto"
POLICY_NAMES = (
    "quota, threshold, factor, entropy_bound, quota_or_threshold, margin, maskgit, entropy, origin, random, "
    "local_leap, hierarchy"
)


def _length(context: click.Context, parameter: click.Parameter, value: str | None) -> int | str | None:
    if value is None or value == GROWING:
        return value
    length: int = click.IntRange(min=1)(value, parameter, context)
    return length


OPTIONS = {
    "gen_length": click.option(
        "--gen-length",
        metavar="N|auto",
        callback=_length,
        help="Tokens to generate at most; auto adds blocks until an end-of-text [bundle's, or 32].",
    ),
    "block_length": click.option(
        "--block-length", type=click.IntRange(min=1), help="Tokens denoised together, left to right [bundle's, or 32]."
    ),
    "steps": click.option(
        "--steps", type=click.IntRange(min=1), help="Most passes over all blocks [bundle's, or one a token]."
    ),
    "policy": click.option("--policy", metavar="NAME", help=f"{POLICY_NAMES} [bundle's, or threshold]."),
    "threshold": click.option(
        "--threshold", type=float, help="Confidence that commits a token at once [bundle's, or 0.9]."
    ),
    "factor": click.option("--factor", type=float, help="Of policy factor: more commits less certain tokens [1.0]."),
    "entropy_bound": click.option("--entropy-bound", type=float, help="Of policy entropy_bound, in nats [0.1]."),
    "temperature": click.option("--temperature", type=float, help="0 takes the best token, above 0 samples [0]."),
    "top_p": click.option(
        "--top-p", type=float, help="Sample among the likeliest tokens that make up this share [1.0]."
    ),
    "seed": click.option("--seed", type=int, help="Key of the random draws [0]."),
    "repetition_penalty": click.option(
        "--repetition-penalty", type=float, help="Above 1, tokens that were written are less likely [1.0]."
    ),
    "eos": click.option("--eos", metavar="MODE", help="End-of-text: none, forbid, last or threshold [none]."),
    "eos_threshold": click.option(
        "--eos-threshold", type=float, help="Confidence that end-of-text needs under --eos threshold [0.9]."
    ),
    "edit": click.option(
        "--edit", type=float, help="Replace committed tokens by others of more than this confidence [off]."
    ),
    "stop": click.option("--stop", multiple=True, metavar="TEXT", help="End the answer before this text (repeatable)."),
    "guidance": click.option("--guidance", type=float, help="Strength of classifier-free guidance [0]."),
    "exact": click.option("--exact", is_flag=True, default=None, help="Compute every pass in full, without a cache."),
    "refresh_every": click.option(
        "--refresh-every", type=click.IntRange(min=1), help="Blocks between full passes [1]."
    ),
    "vicinity": click.option(
        "--vicinity",
        type=click.IntRange(min=0),
        nargs=2,
        metavar="LEFT RIGHT",
        help="Rows beside the block that its passes compute again [0 0].",
    ),
    "monitor": click.option(
        "--monitor", is_flag=True, default=None, help="Measure how far cached and full passes agree."
    ),
}


def generation_options(command: Command) -> Command:
    """Add the options, in order."""
    return options_but()(command)


def options_but(*left_out: str) -> Callable[[Command], Command]:
    """Adds the options but these, which the command asks for in its own way."""

    def add(command: Command) -> Command:
        for name, option in reversed(OPTIONS.items()):
            if name not in left_out:
                command = option(command)
        return command

    return add


def chosen(settings: Settings, given: dict[str, Any]) -> GenerateOptions:
    """The bundle's defaults with what was given on the command line; raises UsageFault."""
    from dataclasses import replace

    changes = {name: value for name, value in given.items() if value is not None and value != ()}
    if changes.get("gen_length") == GROWING:
        changes["gen_length"] = None
    options = replace(settings.generation, **changes)
    options.check()
    return options


def described(options: GenerateOptions) -> str:
    """What a score or a speed was measured with, on one line: what always matters, then what is not the default."""
    from dataclasses import asdict

    from pipeline.runner import GenerateOptions

    always = ("gen_length", "block_length", "policy", "threshold", "temperature", "exact", "refresh_every")
    values, usual = asdict(options), asdict(GenerateOptions())
    values["gen_length"] = GROWING if options.gen_length is None else options.gen_length
    shown = [name for name in values if name in always or values[name] != usual[name]]
    return ", ".join(f"{name.replace('_', '-')} {_word(values[name])}" for name in shown)


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
