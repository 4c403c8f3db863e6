"""`dllmc outliers MODEL`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

FOLDER = click.Path(path_type=Path)


@click.command(epilog="Example: dllmc outliers builtin:tiny-llada -o outliers")
@click.argument("model", metavar="MODEL")
@click.option("-o", "--output", metavar="DIR", required=True, type=FOLDER, help="Folder of the results.")
@click.option("--source", metavar="TEXT", default="builtin", show_default=True, help="As calibration.source.")
@click.option("--states", default="noised", show_default=True, type=click.Choice(["noised", "clean"]))
@click.option("--samples", type=click.IntRange(1, 65536), default=64, show_default=True, help="Canvases.")
@click.option("--length", type=click.IntRange(8, 65536), default=128, show_default=True, help="Tokens of each at most.")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Key of the draws.")
@click.option("--large-ratio", type=float, default=10, show_default=True, help="Times a row's median: large.")
@click.option("--normal-share", type=float, default=0.5, show_default=True, help="Rows a normal outlier is large in.")
@click.option("--massive-ratio", type=float, default=1000, show_default=True, help="Times a row's median: massive.")
@click.option("--threads", type=click.IntRange(min=1), help="Cores to use [all].")
@click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON object.")
def command(
    model: str,
    output: Path,
    large_ratio: float,
    normal_share: float,
    massive_ratio: float,
    threads: int | None,
    as_json: bool,
    **calibration: Any,
) -> None:
    """Show what stands out in the inputs of every linear.

    By layer and site, masked and unmasked tokens apart: channel maxima, crest factors, normal outliers (channels that
    are large on most tokens) and massive ones (very large on some tokens). Writes JSON, Markdown and PNG plots; one
    block is in memory at a time.
    """
    from pipeline.outliers.survey import survey
    from pipeline.outliers.tally import Thresholds
    from pipeline.progress import Progress

    thresholds = Thresholds(large_ratio=large_ratio, normal_share=normal_share, massive_ratio=massive_ratio)
    report = survey(model, output, calibration, thresholds, threads=threads, progress=Progress())
    click.echo(json.dumps(report) if as_json else f"{output}   next: open {output / 'outliers.md'}")
