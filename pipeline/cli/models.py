"""`dllmc models`."""

from __future__ import annotations

import json

import click


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(as_json: bool) -> None:
    """List the supported families and the built-in models."""
    from pipeline.models import BUILTIN, FAMILIES

    if as_json:
        families = {name: family.model_type for name, family in FAMILIES.items()}
        click.echo(json.dumps({"families": families, "builtin": [f"builtin:{name}" for name in BUILTIN]}))
        return
    click.echo("Families, by the model_type of config.json; give the folder of a checkpoint:")
    for name, family in FAMILIES.items():
        click.echo(f"  {name:<8} model_type {family.model_type!r}")
    click.echo("Built in:")
    for name in BUILTIN:
        click.echo(f"  builtin:{name}")
