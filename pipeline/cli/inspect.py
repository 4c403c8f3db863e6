"""`dllmc inspect DIR`."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(folder: Path, as_json: bool) -> None:
    """Show formats and sizes of a bundle without loading it.

    Reads the manifest only; `dllmc verify` checks the files.
    """
    from pipeline.inspection import inspect_bundle, inspection_lines

    click.echo(json.dumps(inspect_bundle(folder)) if as_json else "\n".join(inspection_lines(folder)))
