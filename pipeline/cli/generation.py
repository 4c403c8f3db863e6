"""The options of generation that `dllmc run` and `dllmc eval` share; those not given keep the bundle's defaults."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from pipeline.runner import GenerateOptions, Settings

Command = TypeVar("Command", bound=Callable[..., Any])

OPTIONS = (
    click.option("--gen-length", type=click.IntRange(min=1), help="Tokens to generate at most [bundle's, or 32]."),
    click.option(
        "--block-length", type=click.IntRange(min=1), help="Tokens denoised together, left to right [bundle's, or 32]."
    ),
    click.option("--steps", type=click.IntRange(min=1), help="Most passes over all blocks [bundle's, or one a token]."),
    click.option("--policy", metavar="NAME", help="quota or threshold [bundle's, or threshold]."),
    click.option("--threshold", type=float, help="Confidence that commits a token at once [bundle's, or 0.9]."),
    click.option("--temperature", type=float, help="0 takes the best token, above 0 samples the top ids [0]."),
    click.option("--seed", type=int, help="Key of the random draws [0]."),
)


def generation_options(command: Command) -> Command:
    """Add the options, in order."""
    for option in reversed(OPTIONS):
        command = option(command)
    return command


def chosen(settings: Settings, given: dict[str, Any]) -> GenerateOptions:
    """The bundle's defaults with what was given on the command line; raises UsageFault."""
    from dataclasses import replace

    options = replace(settings.generation, **{name: value for name, value in given.items() if value is not None})
    options.check()
    return options
