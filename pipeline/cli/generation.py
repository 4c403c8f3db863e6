"""The options of generation that all commands share; those not given keep the bundle's defaults."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from pipeline.runner import GenerateOptions, Settings

Command = TypeVar("Command", bound=Callable[..., Any])

GROWING = "auto"
# The word for None, which for click is an option that was not given.
NOTHING = {"gen_length": GROWING, "steps": "auto", "edit": "off"}
POLICY_NAMES = (
    "quota, threshold, factor, entropy_bound, quota_or_threshold, margin, maskgit, entropy, origin, random, "
    "local_leap, hierarchy"
)


def _or_nothing(kind: click.ParamType[Any]) -> Callable[[click.Context, click.Parameter, str | None], Any]:
    """Reads a value of this kind, or the option's word for None."""

    def read(context: click.Context, parameter: click.Parameter, value: str | None) -> Any:
        word = NOTHING[parameter.name or ""]
        return value if value in (None, word) else kind(value, parameter, context)

    return read


OPTIONS = {
    "gen_length": click.option(
        "--gen-length",
        metavar="N|auto",
        callback=_or_nothing(click.IntRange(min=1)),
        help="Tokens to generate at most; auto adds blocks until an end-of-text [bundle's, or 32].",
    ),
    "block_length": click.option(
        "--block-length", type=click.IntRange(min=1), help="Tokens denoised together, left to right [bundle's, or 32]."
    ),
    "steps": click.option(
        "--steps",
        metavar="N|auto",
        callback=_or_nothing(click.IntRange(min=1)),
        help="Most passes over all blocks; auto is one a token [bundle's, or auto].",
    ),
    "policy": click.option("--policy", metavar="NAME", help=f"{POLICY_NAMES} [bundle's, or threshold]."),
    "threshold": click.option(
        "--threshold", type=float, help="Confidence that commits a token at once [bundle's, or 0.9]."
    ),
    "factor": click.option(
        "--factor", type=float, help="Of policy factor: more commits less certain tokens [bundle's, or 1.0]."
    ),
    "entropy_bound": click.option(
        "--entropy-bound", type=float, help="Of policy entropy_bound, in nats [bundle's, or 0.1]."
    ),
    "temperature": click.option(
        "--temperature", type=float, help="0 takes the best token, above 0 samples [bundle's, or 0.0]."
    ),
    "top_p": click.option(
        "--top-p", type=float, help="Sample among the likeliest tokens that make up this share [bundle's, or 1.0]."
    ),
    "seed": click.option("--seed", type=int, help="Key of the random draws [bundle's, or 0]."),
    "repetition_penalty": click.option(
        "--repetition-penalty",
        type=float,
        help="Above 1, tokens that were written are less likely [bundle's, or 1.0].",
    ),
    "eos": click.option(
        "--eos", metavar="MODE", help="End-of-text: none, forbid, last or threshold [bundle's, or none]."
    ),
    "eos_threshold": click.option(
        "--eos-threshold",
        type=float,
        help="Confidence that end-of-text needs under --eos threshold [bundle's, or 0.9].",
    ),
    "edit": click.option(
        "--edit",
        metavar="FLOAT|off",
        callback=_or_nothing(click.FLOAT),
        help="Replace committed tokens by others of more than this confidence [bundle's, or off].",
    ),
    "stop": click.option(
        "--stop",
        multiple=True,
        metavar="TEXT",
        help="End the answer before this text (repeatable); one empty text is none [bundle's, or none].",
    ),
    "guidance": click.option("--guidance", type=float, help="Strength of classifier-free guidance [bundle's, or 0.0]."),
    "exact": click.option(
        "--exact/--no-exact", default=None, help="Compute every pass in full, without a cache [bundle's, or no]."
    ),
    "refresh_every": click.option(
        "--refresh-every", type=click.IntRange(min=1), help="Blocks between full passes [bundle's, or 1]."
    ),
    "vicinity": click.option(
        "--vicinity",
        type=click.IntRange(min=0),
        nargs=2,
        metavar="LEFT RIGHT",
        help="Rows beside the block that its passes compute again [bundle's, or 15 0].",
    ),
    "monitor": click.option(
        "--monitor/--no-monitor",
        default=None,
        help="Measure how far cached and full passes agree [bundle's, or no].",
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

    asked = {name: value for name, value in given.items() if value is not None and value != ()}
    changes: dict[str, Any] = {name: None if value == NOTHING.get(name) else value for name, value in asked.items()}
    if changes.get("stop") == ("",):
        changes["stop"] = ()
    options = replace(settings.generation, **changes)
    options.check()
    return options


def described(options: GenerateOptions) -> str:
    """What a score or a speed was measured with, on one line: what always matters, then what is not the default."""
    from dataclasses import asdict

    from pipeline.runner import GenerateOptions

    always = ("gen_length", "block_length", "policy", "threshold", "temperature", "exact", "refresh_every")
    values, usual = asdict(options), asdict(GenerateOptions())
    shown = [name for name in values if name in always or values[name] != usual[name]]
    return ", ".join(f"{name.replace('_', '-')} {said(name, values[name])}" for name in shown)


def said(name: str, value: Any) -> str:
    """The value of an option as one writes it."""
    if value is None:
        return NOTHING[name]
    if isinstance(value, bool):
        return "yes" if value else "no"
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
