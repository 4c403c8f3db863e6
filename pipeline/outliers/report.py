"""What a scan found, as JSON, as Markdown and as files; a folder of results is there whole or not at all."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from pipeline.errors import UsageFault
from pipeline.folder import FOLDER_MODE, make_folder, os_faults, sync_tree, write_bytes, write_json
from pipeline.outliers.scan import Scan
from pipeline.outliers.tally import Finding, Thresholds

REPORT, PAGE, MAXIMA = "outliers.json", "outliers.md", "channel_maxima.safetensors"
TOP_CHANNELS = 8
LISTED_CHANNELS = 8


def as_json(scan: Scan, model: str, source: dict[str, Any], thresholds: Thresholds) -> dict[str, Any]:
    """The whole report but for the maxima of all channels, of which it has the largest."""
    return {
        "model": model,
        "calibration": source,
        "thresholds": asdict(thresholds),
        "worst_site": scan.worst,
        "sites": {
            site: {state: _finding(finding) for state, finding in by_state.items()}
            for site, by_state in scan.findings.items()
        },
    }


def _finding(finding: Finding) -> dict[str, Any]:
    maxima = finding.channel_maxima
    top = maxima.topk(min(TOP_CHANNELS, len(maxima)))
    values = {
        name: value if isinstance(value, int | list) else _rounded(value)
        for name, value in vars(finding).items()
        if name != "channel_maxima"
    }
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return values | {
        "kind": finding.kind,
        "channels": len(maxima),
        "largest_channels": [{"channel": channel, "max": _rounded(value)} for channel, value in pairs],
    }


def _rounded(value: Any) -> Any:
    """Six significant digits: more would differ between machines."""
    if isinstance(value, tuple):
        return {"median": _rounded(value[0]), "max": _rounded(value[1])}
    return float(f"{value:.6g}")


def as_markdown(report: dict[str, Any]) -> str:
    """A table of all sites and what its words mean."""
    part, limits = report["calibration"], report["thresholds"]
    head = ("site", "state", "tokens", "max", "crest", "row crest", "peak/median", "massive tokens", "kind", "channels")
    rows = [
        (site, state, *_cells(finding))
        for site, by_state in report["sites"].items()
        for state, finding in by_state.items()
    ]
    table = [head, tuple("---" if i < 2 or i > 7 else "---:" for i in range(len(head))), *rows]
    return "\n".join(
        [
            f"# Outliers of {report['model']}",
            "",
            f"{part['samples']} {part['states']} canvases of {part['source']} text, at most {part['length']} tokens, "
            f"seed {part['seed']}. Worst site: `{report['worst_site']}`.",
            "",
            *(f"| {' | '.join(map(str, row))} |" for row in table),
            "",
            "- crest: largest magnitude over the RMS of all rows; row crest: median over rows of the same in one row",
            "- peak/median: median over rows of a row's largest magnitude over its median magnitude",
            f"- normal outlier: a channel of at least {limits['large_ratio']:g} row medians in at least "
            f"{limits['normal_share']:.0%} of the rows",
            f"- massive outlier: a value of at least {limits['massive_ratio']:g} row medians in any other channel; "
            "massive tokens: share of rows with one",
            f"- channels: normal ones, then massive ones after a slash; all of them in `{REPORT}`, the maxima of all "
            f"channels in `{MAXIMA}`",
            "",
        ]
    )


def _cells(finding: dict[str, Any]) -> tuple[str, ...]:
    normal, massive = finding["normal_channels"], finding["massive_channels"]
    return (
        str(finding["tokens"]),
        f"{finding['max']:.3g}",
        f"{finding['crest_factor']:.1f}",
        f"{finding['token_crest_factor']['median']:.1f}",
        f"{finding['token_peak_ratio']['median']:.1f}",
        f"{finding['massive_tokens']:.2%}",
        finding["kind"],
        _listed(normal) + (f" / {_listed(massive)}" if massive else ""),
    )


def _listed(channels: list[int]) -> str:
    more = len(channels) - LISTED_CHANNELS
    return " ".join(map(str, channels[:LISTED_CHANNELS])) + (f" and {more} more" if more > 0 else "") or "-"


def write_report(folder: Path, scan: Scan, report: dict[str, Any]) -> None:
    """JSON, Markdown and the maxima of all channels."""
    write_json(folder / REPORT, report)
    write_bytes(folder / PAGE, as_markdown(report).encode())
    maxima = {
        f"{site}/{state}": finding.channel_maxima.contiguous()
        for site, by_state in scan.findings.items()
        for state, finding in by_state.items()
    }
    save_file(maxima, folder / MAXIMA)


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `output` by one rename at the end and is removed on any failure.

    Raises UsageFault when `output` exists and is not an empty folder, EnvironmentFault where it cannot be written.
    """
    output = Path(os.path.abspath(output))
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UsageFault(f"{output} exists already; remove it, or choose another place with -o DIR")
    with os_faults(f"cannot write {output}"):
        make_folder(output.parent)
        with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as scratch:
            folder = Path(scratch) / output.name
            folder.mkdir()
            yield folder
            sync_tree(folder)
            folder.chmod(FOLDER_MODE)
            folder.rename(output)
