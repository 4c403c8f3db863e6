"""`dllmc recipe list|show`."""

from __future__ import annotations

import click


@click.group()
def command() -> None:
    """Show the built-in recipes and what they resolve to."""


@command.command("list")
def list_recipes() -> None:
    """List the built-in recipes."""
    from pipeline.recipe_file import BUILTIN_RECIPES, load_recipe

    width = max(map(len, BUILTIN_RECIPES))
    for name in BUILTIN_RECIPES:
        click.echo(f"{name:<{width}} {load_recipe(name).description}")


@command.command("show")
@click.argument("recipe", metavar="NAME|FILE")
@click.option("--set", "sets", multiple=True, metavar="A.B=VALUE", help="Change one key (repeatable).")
def show(recipe: str, sets: tuple[str, ...]) -> None:
    """Print a recipe as an export would resolve it."""
    from pipeline.recipe_file import dump_recipe, load_recipe

    click.echo(dump_recipe(load_recipe(recipe, sets)), nl=False)
