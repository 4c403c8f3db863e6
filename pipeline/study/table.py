"""The study as Markdown: tables of each model like the paper's, findings, and what was impossible."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Line = Mapping[str, Any]


def _bits(value: Mapping[str, Any]) -> str:
    return f"{value['mean']:.4f}{_change(value, 1, '.4f')}"


def _percent(value: Mapping[str, Any]) -> str:
    inferior = "" if value.get("not_inferior", True) else " !"
    return f"{100 * value['mean']:.1f}{_change(value, 100, '.1f')}{inferior}"


def _share(value: Mapping[str, Any]) -> str:
    return f"{100 * value['mean']:.2f} %"


def _small(value: Mapping[str, Any]) -> str:
    return f"{value['mean']:.3g}"


def _change(value: Mapping[str, Any], unit: float, form: str) -> str:
    against = value.get("against_full")
    if against is None:
        return ""
    difference, low, high = (format(unit * against[name], f"+{form}") for name in ("difference", "low", "high"))
    return f" ({difference} [{low}, {high}])"


# Heading -> figure and how it is written.
COLUMNS: dict[str, tuple[str, Callable[[Mapping[str, Any]], str]]] = {
    "bits a masked token": ("nll", _bits),
    "KL": ("kl", _small),
    "argmax agrees": ("argmax", _share),
    "exact match %": ("match", _percent),
    "same answers": ("same_answers", _share),
    "choice %": ("choice", _percent),
    "hidden error, forced": ("forced", _share),
    "hidden error, free": ("free", _share),
}

LEGEND = """\
Every figure is on the same samples for all rows of a model; in brackets the change against full precision (float32) and
its 95 % interval by paired bootstrap. Rank: 1 + the number of methods with the same bits that need fewer bits a masked
token at 95 %; equal ranks cannot be told apart. `!`: exact match may be inferior by more than one point. KL in bits.
Hidden error: squared error of the final norm's output over all rows of the canvas and all denoising steps, as a share
of its power; forced along the canvases of full precision, and free-running. Rows with several seeds (calibration draws
and rotations) show their mean; the interval is of the samples.
"""


def markdown(study: Mapping[str, Any], plots: Sequence[str]) -> str:
    """The whole page."""
    lines = ["# Study", "", LEGEND]
    models = list(dict.fromkeys(line["model"] for line in study["rows"]))
    for model in models:
        own = [line for line in study["rows"] if line["model"] == model]
        lines += [f"## {model}", "", *_main(own), "", *_kinds(own)]
    lines += ["## Findings", "", *_findings(study["findings"]), ""]
    absent = [line for line in study["rows"] if "reason" in line]
    if absent:
        lines += ["## Not possible", "", *(f"- {_named(line)}: {_one_line(line['reason'])}" for line in absent), ""]
    lines += [f"![{name}]({name})" for name in plots]
    sizes = ", ".join(f"{name} {value}" for name, value in sorted(study["sizes"].items()))
    return "\n".join([*lines, "", f"Sizes: {sizes}.", ""])


def _main(lines: Sequence[Line]) -> list[str]:
    measured = [line for line in lines if "reason" not in line]
    columns = {head: at for head, at in COLUMNS.items() if any(at[0] in line["measured"] for line in measured)}
    table = [["bits", "method", "states", "seeds", "rank", *columns]]
    for line in measured:
        found = line["measured"]
        cells = [form(found[name]) if name in found else "" for name, form in columns.values()]
        rank = "" if line["rank"] is None else str(line["rank"])
        table.append([line["bits"], line["method"], line["states"], str(line["seeds"]), rank, *cells])
    return _grid(table)


def _kinds(lines: Sequence[Line]) -> list[str]:
    """Exact match by kind of problem, in per cent."""
    measured = [line for line in lines if "match" in line.get("measured", {})]
    if not measured:
        return []
    names = [name for name in measured[0]["measured"] if name.startswith("match.")]
    table = [["bits", "method", "states", *(name.removeprefix("match.") for name in names)]]
    for line in measured:
        found = line["measured"]
        cells = [f"{100 * found[name]['mean']:.1f}" for name in names]
        table.append([line["bits"], line["method"], line["states"], *cells])
    return ["Exact match by kind of problem, in per cent:", "", *_grid(table), ""]


def _findings(found: Sequence[Mapping[str, Any]]) -> list[str]:
    table = [["the study's finding", "where", "here", "held", "figures"]]
    for each in found:
        held = f"{each['held']} of {each['of']}" if each["of"] else ""
        table.append([each["claim"], each["source"], each["verdict"], held, "; ".join(each["figures"])])
    return _grid(table)


def _grid(table: Sequence[Sequence[str]]) -> list[str]:
    head, *body = [f"| {' | '.join(_one_line(cell) for cell in row)} |" for row in table]
    return [head, "|" + "---|" * len(table[0]), *body]


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _named(line: Line) -> str:
    return " ".join(part for part in (line["model"], line["method"], line["bits"], line["states"]) if part)
