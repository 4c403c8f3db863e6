"""The study's pictures: bits a masked token by method and bits, hidden-state error by denoising step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.pictures import new_figure, write_figure
from pipeline.study.grid import FULL, short_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Line = Mapping[str, Any]
DOTS = 110
MARKERS = "osD^vP*X<>"


def draw(lines: Sequence[Line], folder: Path) -> list[str]:
    """Write the pictures that the measured figures allow; their names."""
    figures = {"nll.png": _nll(lines), "trajectory.png": _trajectory(lines)}
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


def _steps(measured: Mapping[str, Any], way: str) -> list[float]:
    names = sorted((int(name.removeprefix(f"{way}.")), name) for name in measured if name.startswith(f"{way}."))
    return [measured[name]["mean"] for _, name in names]


def _series(lines: Sequence[Line]) -> dict[str, dict[str, Any]]:
    """Colour and marker of every method, the same in all pictures of one study."""
    names = dict.fromkeys(_label(line) for line in lines)
    return {
        name: {"color": f"C{number % 10}", "marker": MARKERS[number % len(MARKERS)]}
        for number, name in enumerate(names)
    }


def _label(line: Line) -> str:
    return " ".join(part for part in (line["method"], line["states"]) if part)


def _unique(lines: Sequence[Line], name: str) -> list[str]:
    return list(dict.fromkeys(line[name] for line in lines))


def _panels(columns: int, rows: int, *, width: float, height: float) -> tuple[Figure, list[list[Axes]]]:
    return new_figure(rows, columns, (width * columns + 1.6, height * rows), share_y="row")


def _with_legend(figure: Figure, labelled: Axes) -> Figure:
    handles, labels = labelled.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8)
    return figure
