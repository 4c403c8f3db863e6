"""`dllmc verify DIR`."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(folder: Path, as_json: bool) -> None:
    """Find changed, missing and extra files of a bundle.

    Exit code 0 when every file is what the manifest names, 7 when not, 4 when DIR is no bundle.
    """
    from pipeline.manifest import verify
    from pipeline.progress import Progress

    with Progress(json=as_json).stage("verify", brief=True) as stage:
        manifest = verify(folder, on_bytes=stage.advance_bytes)
    if as_json:
        click.echo(json.dumps({"files": len(manifest.files), "identity": manifest.identity}))
    else:
        click.echo(f"{len(manifest.files)} of {len(manifest.files)} files verified, identity {manifest.identity}")
