"""The study's pictures: bits a masked token by method and bits; hidden states, tokens and masks by denoising step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.pictures import new_figure, write_figure
from pipeline.study.grid import FULL, short_name
from pipeline.study.table import method_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Line = Mapping[str, Any]
DOTS = 110
MARKERS = "osD^vP*X<>"
STEPS = "steps.png"

# Figure by step -> its axis. The errors as arXiv 2606.04945 draws them in figure 3.
BY_STEP = {
    "free_mse": "squared error of hidden states, free",
    "forced_mse": "squared error of hidden states, forced",
    "free_tokens": "share of equal tokens, free",
    "forced_tokens": "share of equal tokens, forced",
}


def draw(lines: Sequence[Line], folder: Path) -> list[str]:
    """Write the pictures that the measured figures allow; their names."""
    figures = {"nll.png": _nll(lines), "trajectory.png": _trajectory(lines), STEPS: _by_step(lines)}
    for name, figure in figures.items():
        if figure is None:
            (folder / name).unlink(missing_ok=True)
        else:
            write_figure(folder / name, figure, dots=DOTS)
    return [name for name, figure in figures.items() if figure is not None]


def _nll(lines: Sequence[Line]) -> Figure | None:
    """One panel a model: bits a masked token beyond full precision, by format, one mark a method."""
    measured = [line for line in lines if "nll" in line.get("measured", {}) and line["method"] != FULL]
    if not measured:
        return None
    models, bits = (_unique(measured, name) for name in ("model", "bits"))
    figure, panels = _panels(len(models), 1, width=2.2 + 1.5 * len(bits), height=4.2)
    series = _series(measured)
    for panel, model in zip(panels[0], models, strict=True):
        for number, (name, style) in enumerate(series.items()):
            own = {line["bits"]: line for line in measured if line["model"] == model and _label(line) == name}
            at = [place for place, each in enumerate(bits) if each in own]
            values = [own[bits[place]]["measured"]["nll"]["against_full"] for place in at]
            centres = [value["difference"] for value in values]
            # Percentiles of few samples or seeds may lie all on one side of the mean, which a bar cannot.
            spread = [[max(0.0, value["difference"] - value["low"]) for value in values]]
            spread += [[max(0.0, value["high"] - value["difference"]) for value in values]]
            shift = 0.8 * ((number + 0.5) / len(series) - 0.5)
            panel.errorbar(
                [place + shift for place in at], centres, spread, ls="", ms=5, capsize=2, label=name, **style
            )
        panel.set_xticks(range(len(bits)), bits)
        for place in range(1, len(bits)):
            panel.axvline(place - 0.5, color="0.9", lw=0.8)
        # Near 0 linear, beyond logarithmic: formats differ by orders of magnitude, and a difference may be negative.
        panel.set_yscale("symlog", linthresh=0.01)
        panel.axhline(0, color="0.4", lw=0.8)
        panel.set_title(short_name(model))
        panel.set_ylabel("bits a masked token beyond full precision")
    return _with_legend(figure, panels[0][-1])


def _trajectory(lines: Sequence[Line]) -> Figure | None:
    """One panel a model and format: error of the hidden state by denoising step, forced drawn, free dashed."""
    measured = [line for line in lines if "forced" in line.get("measured", {})]
    if not measured:
        return None
    models, bits = (_unique(measured, name) for name in ("model", "bits"))
    figure, panels = _panels(len(bits), len(models), width=3.4, height=3.0)
    for row, model in zip(panels, models, strict=True):
        for panel, each in zip(row, bits, strict=True):
            for name, style in _series(measured).items():
                for line in measured:
                    if (line["model"], line["bits"], _label(line)) != (model, each, name):
                        continue
                    for way, dash in (("forced", "-"), ("free", ":")):
                        steps = _steps(line["measured"], way)
                        label = name if way == "forced" else None
                        panel.plot(range(1, len(steps) + 1), steps, ls=dash, ms=3, lw=1, label=label, **style)
            panel.set_yscale("log")
            panel.set_title(f"{short_name(model)} {each}", fontsize=9)
        row[0].set_ylabel("error / power")
    for panel in panels[-1]:
        panel.set_xlabel("denoising step (dotted: free-running)")
        panel.locator_params(axis="x", integer=True)
    return _with_legend(figure, panels[0][-1])


def _by_step(lines: Sequence[Line]) -> Figure | None:
    """One row of panels a model and format, one panel a figure, bands of 95 %; then masks left in free runs."""
    measured = [line for line in lines if "forced" in line.get("measured", {})]
    if not measured:
        return None
    places = list(dict.fromkeys((line["model"], line["bits"]) for line in measured))
    columns = len(BY_STEP) + 1
    figure, panels = new_figure(len(places), columns, (3.6 * columns + 1.6, 3.0 * len(places)))
    series = _series(measured)
    for row, (model, bits) in zip(panels, places, strict=True):
        own = [line for line in measured if (line["model"], line["bits"]) == (model, bits)]
        for panel, name in zip(row, BY_STEP, strict=False):
            for line in own:
                _band(panel, _values(line["measured"], name), label=_label(line), **series[_label(line)])
            if name.endswith("_mse"):
                panel.set_yscale("log", nonpositive="mask")
        for line in lines:
            if line["model"] == model and "masks_left" in line and (line in own or line["method"] == FULL):
                style = {"color": "0.4", "marker": ""} if line["method"] == FULL else series[_label(line)]
                left = line["masks_left"]
                row[-1].plot(range(1, len(left) + 1), left, lw=1, ms=3, label=_label(line), **style)
        for panel, words in zip(row, (*BY_STEP.values(), "masked positions, free"), strict=True):
            panel.set_ylabel(words, fontsize=8)
            panel.set_title(f"{short_name(model)} {bits}", fontsize=9)
            panel.locator_params(axis="x", integer=True)
    for panel in panels[-1]:
        panel.set_xlabel("denoising step")
    return _with_legend(figure, panels[0][0])


def _band(panel: Axes, values: Sequence[Mapping[str, Any]], *, label: str, color: str, marker: str) -> None:
    at = range(1, len(values) + 1)
    panel.plot(at, [value["mean"] for value in values], color=color, marker=marker, ms=3, lw=1, label=label)
    low, high = ([value["interval"][bound] for value in values] for bound in ("low", "high"))
    panel.fill_between(at, low, high, color=color, alpha=0.2, lw=0)


def _steps(measured: Mapping[str, Any], way: str) -> list[float]:
    return [value["mean"] for value in _values(measured, way)]


def _values(measured: Mapping[str, Any], figure: str) -> list[Mapping[str, Any]]:
    """A figure at every step, in their order."""
    names = sorted((int(name.removeprefix(f"{figure}.")), name) for name in measured if name.startswith(f"{figure}."))
    return [measured[name] for _, name in names]


def _series(lines: Sequence[Line]) -> dict[str, dict[str, Any]]:
    """Colour and marker of every method, the same in all pictures of one study."""
    names = dict.fromkeys(_label(line) for line in lines)
    return {
        name: {"color": f"C{number % 10}", "marker": MARKERS[(number + number // 10) % len(MARKERS)]}
        for number, name in enumerate(names)
    }


def _label(line: Line) -> str:
    return " ".join(part for part in (method_of(line), line["states"]) if part)


def _unique(lines: Sequence[Line], name: str) -> list[str]:
    return list(dict.fromkeys(line[name] for line in lines))


def _panels(columns: int, rows: int, *, width: float, height: float) -> tuple[Figure, list[list[Axes]]]:
    return new_figure(rows, columns, (width * columns + 1.6, height * rows), share_y="row")


def _with_legend(figure: Figure, labelled: Axes) -> Figure:
    handles, labels = labelled.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8)
    return figure
