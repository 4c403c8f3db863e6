"""The whole of `dllmc outliers`: model and text in, a folder of results out."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from pipeline.calibration.corpus import calibration_states
from pipeline.calibration.sources import check_source
from pipeline.capture import pieces
from pipeline.errors import UsageFault
from pipeline.models import resolve
from pipeline.models.checkpoint import open_checkpoint
from pipeline.outliers.plots import write_plots
from pipeline.outliers.report import as_json, new_folder, write_report
from pipeline.outliers.scan import scan
from pipeline.outliers.tally import Thresholds
from pipeline.pictures import check_matplotlib
from pipeline.progress import Progress
from pipeline.recipe import Calibration


def survey(
    model: str,
    output: Path,
    calibration: dict[str, Any],
    thresholds: Thresholds,
    *,
    threads: int | None,
    progress: Progress,
) -> dict[str, Any]:
    """The report, which is also in `output`; `calibration` are fields of a recipe's part of this name.

    Raises UsageFault for values that make no sense, and before any work when `output` exists.
    """
    part = _checked(calibration, thresholds)
    check_matplotlib()
    if threads is not None:
        torch.set_num_threads(threads)
    with new_folder(output) as folder:
        checkpoint = open_checkpoint(resolve(model))
        tokenizer = checkpoint.tokenizer()
        states = calibration_states(part, tokenizer, checkpoint.config)
        with progress.stage("scan") as stage:
            count = stage.counter(len(pieces(checkpoint.config)), "pieces")
            found = scan(checkpoint, states, thresholds, on_piece=count)
            report = as_json(found, model, part.model_dump(exclude={"noise_buckets"}), thresholds)
            stage.finish(_summary(report))
        write_report(folder, found, report)
        write_plots(folder, found)
    return report


def _checked(calibration: dict[str, Any], thresholds: Thresholds) -> Calibration:
    try:
        check_source(calibration["source"])
    except ValueError as fault:
        raise UsageFault(f"source: {fault}") from fault
    for name, value in asdict(thresholds).items():
        if not 0 < value < float("inf"):
            raise UsageFault(f"{name} is {value}; expected a finite number above 0")
    if thresholds.massive_ratio < thresholds.large_ratio:
        raise UsageFault(
            f"massive_ratio {thresholds.massive_ratio:g} is below large_ratio {thresholds.large_ratio:g}; expected it "
            "above, since a massive value is a large one"
        )
    return Calibration(**calibration)


def _summary(report: dict[str, Any]) -> str:
    findings = [finding for by_state in report["sites"].values() for finding in by_state.values()]
    kinds = {kind: sum(finding["kind"] in (kind, "both") for finding in findings) for kind in ("normal", "massive")}
    return (
        f"{len(findings)} site states: normal outliers in {kinds['normal']}, massive ones in {kinds['massive']}; worst "
        f"{report['worst_site']}"
    )
