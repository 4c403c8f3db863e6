"""The study as Markdown: tables of each model like the paper's, findings, and what was impossible."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pipeline.study.findings import ALIKE, KNOWS

Line = Mapping[str, Any]


def _bits(value: Mapping[str, Any]) -> str:
    return f"{value['mean']:.4f}{_change(value, 1, '.4f')}{_seeds(value, 1, '.4f')}"


def _percent(value: Mapping[str, Any]) -> str:
    inferior = "" if value.get("not_inferior", True) else " !"
    return f"{100 * value['mean']:.1f}{_change(value, 100, '.1f')}{inferior}{_seeds(value, 100, '.1f')}"


def _share(value: Mapping[str, Any]) -> str:
    return f"{100 * value['mean']:.2f} %{_interval(value, 100, '.2f')}"


def _small(value: Mapping[str, Any]) -> str:
    return f"{value['mean']:.3g}{_interval(value, 1, '.3g')}"


def _change(value: Mapping[str, Any], unit: float, form: str) -> str:
    against = value.get("against_full")
    return "" if against is None else f" ({_difference(against, unit, form)})"


def _difference(against: Mapping[str, Any], unit: float, form: str) -> str:
    difference, low, high = (format(unit * against[name], f"+{form}") for name in ("difference", "low", "high"))
    return f"{difference} [{low}, {high}]"


def _interval(value: Mapping[str, Any], unit: float, form: str) -> str:
    low, high = (format(unit * value["interval"][name], form) for name in ("low", "high"))
    return f" [{low}, {high}]"


def _seeds(value: Mapping[str, Any], unit: float, form: str) -> str:
    """What the seeds gave, from the least to the most."""
    found = value.get("seeds", ())
    return f" {unit * min(found):{form}}..{unit * max(found):{form}}" if found else ""


# Heading -> figure and how it is written.
COLUMNS: dict[str, tuple[str, Callable[[Mapping[str, Any]], str]]] = {
    "bits a masked token": ("nll", _bits),
    "KL": ("kl", _small),
    "argmax agrees": ("argmax", _share),
    "exact match %": ("match", _percent),
    "same answers": ("same_answers", _share),
    "same tokens": ("same_tokens", _share),
    "steps before they part": ("same_steps", _share),
    "choice %": ("choice", _percent),
    "hidden error, forced": ("forced", _share),
    "hidden error, free": ("free", _share),
}

# The same of differences from the first variant, where there are variants.
AGAINST_FIRST: dict[str, tuple[str, Callable[[Mapping[str, Any]], str]]] = {
    "bits a masked token": ("nll", lambda value: _difference(value["against_first"], 1, ".4f")),
    "exact match, points": ("match", lambda value: _difference(value["against_first"], 100, ".1f")),
    "hidden error, forced, %": ("forced", lambda value: _difference(value["against_first"], 100, ".2f")),
    "hidden error, free, %": ("free", lambda value: _difference(value["against_first"], 100, ".2f")),
}

LEGEND = """\
Every figure is on the same samples for all rows of a model; in brackets the change against full precision (float32) and
its 95 % interval by paired bootstrap, or the interval of the figure itself. Rows with several seeds (calibration draws
and rotations) show their mean, what the seeds gave as least..most, and intervals of samples and seeds together; rows
with one seed say nothing of other draws. Rank: 1 + the number of rows with the same bits that need fewer bits a masked
token at 95 %, without a correction for the number of comparisons; equal ranks cannot be told apart. `!`: exact match
may be inferior by more than one point. KL in bits. Same answers, tokens and steps: of free runs against those of full
precision, ids up to the end of text at the end of the run, and denoising steps before the canvases first differ, as a
share of all; full precision runs in torch, what can be exported in ONNX Runtime. Hidden error: squared error of the
final norm's output over all rows of the canvas and all denoising steps, as a share of its power; forced along the
canvases of full precision, and free-running.
"""

VERDICTS = f"""\
The study is "Quantization Meets dLLMs" (arXiv 2508.14896). A claim agrees when it holds for every row it speaks of, is
mixed when for some it does not, and is not settled when no row contradicts it but the interval of one has room for
both. One method beats another when its interval of bits excludes 0; a difference below {100 * ALIKE:.0f} % of the
other's loss is none that matters. Exact match says nothing of a model whose full precision answers less than
{100 * KNOWS:.0f} % right; such models are left out.
"""


def markdown(study: Mapping[str, Any], plots: Sequence[str]) -> str:
    """The whole page."""
    lines = ["# Study", "", LEGEND]
    models = list(dict.fromkeys(line["model"] for line in study["rows"]))
    for model in models:
        own = [line for line in study["rows"] if line["model"] == model]
        lines += [f"## {model}", "", *_main(own), "", *_against_first(own), *_kinds(own)]
    if any(each["of"] for each in study["findings"]):
        lines += ["## Findings", "", VERDICTS, *_findings(study["findings"]), ""]
    absent = [line for line in study["rows"] if "reason" in line]
    if absent:
        lines += ["## Not possible", "", *(f"- {_named(line)}: {_one_line(line['reason'])}" for line in absent), ""]
    lines += [f"![{name}]({name})" for name in plots]
    sizes = ", ".join(f"{name} {value}" for name, value in sorted(study["sizes"].items()))
    versions = ", ".join(f"{name} {version}" for name, version in study["made_with"].items())
    asked = f"Asked: {study['task']}. Sizes: {sizes}. Threads of a cell: {study['threads']}."
    return "\n".join([*lines, "", asked, "", f"{versions}.", ""])


def _main(lines: Sequence[Line]) -> list[str]:
    measured = [line for line in lines if "reason" not in line]
    columns = {head: at for head, at in COLUMNS.items() if any(at[0] in line["measured"] for line in measured)}
    table = [["bits", "method", "states", "seeds", "rank", *columns]]
    for line in measured:
        found = line["measured"]
        cells = [form(found[name]) if name in found else "" for name, form in columns.values()]
        rank = "" if line["rank"] is None else str(line["rank"])
        table.append([line["bits"], method_of(line), line["states"], str(line["seeds"]), rank, *cells])
    return _grid(table)


def _against_first(lines: Sequence[Line]) -> list[str]:
    """Changes against the first variant, which is not among the rows."""
    name = next((line["variant"] for line in lines if "variant" in line), None)
    compared = [line for line in lines if any("against_first" in value for value in line.get("measured", {}).values())]
    if not compared:
        return []

    def has(line: Line, figure: str) -> bool:
        return "against_first" in line["measured"].get(figure, {})

    columns = {head: at for head, at in AGAINST_FIRST.items() if any(has(line, at[0]) for line in compared)}
    table = [["bits", "method", "states", *columns]]
    for line in compared:
        cells = [form(line["measured"][figure]) if has(line, figure) else "" for figure, form in columns.values()]
        table.append([line["bits"], method_of(line), line["states"], *cells])
    return [f"Against {name}, paired:", "", *_grid(table), ""]


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
        table.append([line["bits"], method_of(line), line["states"], *cells])
    return ["Exact match by kind of problem, in per cent:", "", *_grid(table), ""]


def _findings(found: Sequence[Mapping[str, Any]]) -> list[str]:
    table = [["finding", "the study's place", "here", "held", "figures", "why: what differs here"]]
    for each in found:
        held = f"{each['held']} of {each['of']}" if each["of"] else ""
        figures, why = ("<br>".join(each[name]) for name in ("figures", "why"))
        table.append([each["claim"], each["source"], each["verdict"], held, figures, why])
    return _grid(table)


def _grid(table: Sequence[Sequence[str]]) -> list[str]:
    head, *body = [f"| {' | '.join(_one_line(cell) for cell in row)} |" for row in table]
    return [head, "|" + "---|" * len(table[0]), *body]


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _named(line: Line) -> str:
    return " ".join(part for part in (line["model"], method_of(line), line["bits"], line["states"]) if part)


def method_of(line: Line) -> str:
    """`star, no TAC`: the method, and which variant of it."""
    return f"{line['method']}, {line['variant']}" if "variant" in line else str(line["method"])
