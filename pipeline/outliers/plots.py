"""Pictures of a scan: heat maps of all sites, channel maxima, and rows of the worst site.

Shape letters: T tokens, K channels.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from passes.stats import STATES
from pipeline.outliers.scan import Scan
from pipeline.outliers.tally import Finding
from pipeline.pictures import new_figure, write_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HEAT_MAPS, CHANNELS, WORST = "heatmaps.png", "channels.png", "worst_site.png"
DOTS = 120
MAX_COLUMNS = 512  # of a picture of channels; more are told apart by nobody

# Title of a heat map, what it shows of a site, and whether its scale is logarithmic.
MEASURES: tuple[tuple[str, Callable[[Finding], float], bool], ...] = (
    ("largest magnitude", lambda finding: finding.max, True),
    ("crest factor", lambda finding: finding.crest_factor, False),
    ("row peak over row median", lambda finding: finding.token_peak_ratio[0], True),
    ("share of rows with massive values", lambda finding: finding.massive_tokens, False),
    ("normal outlier channels", lambda finding: len(finding.normal_channels), False),
)


def write_plots(folder: Path, scan: Scan) -> list[str]:
    """PNG files of heat maps, channel maxima and the worst site; returns their names."""
    figures = {HEAT_MAPS: _heat_maps(scan), CHANNELS: _channels(scan), WORST: _worst(scan)}
    for name, figure in figures.items():
        write_figure(folder / name, figure, dots=DOTS)
    return list(figures)


def layers_and_sites(scan: Scan) -> tuple[list[int], list[str]]:
    """Layers, and the sites that every layer has; the head is in none."""
    names = [site.split(".", 2) for site in scan.findings if site.startswith("blocks.")]
    return sorted({int(layer) for _, layer, _ in names}), list(dict.fromkeys(site for *_, site in names))


def _heat_maps(scan: Scan) -> "Figure":
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.ticker import LogLocator

    layers, sites = layers_and_sites(scan)
    size = (2 * max(4.0, 1.8 + 0.22 * len(layers)) + 1.2, len(MEASURES) * 1.9)
    figure, axes = new_figure(len(MEASURES), len(STATES), size)
    for row, (title, measure, logarithmic) in zip(axes, MEASURES, strict=True):
        grids = [by_layer(scan, layers, sites, state, measure) for state in STATES]
        present = torch.cat(grids)[torch.cat(grids).isfinite()]
        low, high = float(present.min()), float(present.max())
        norm = LogNorm(max(low, 1e-9), max(high, 2e-9)) if logarithmic else Normalize(0, high or 1)
        for axis, grid, state in zip(row, grids, STATES, strict=True):
            image = axis.imshow(grid.numpy(), aspect="auto", cmap="viridis", norm=norm)
            axis.set_title(f"{title}, {state}", fontsize=9)
            axis.set_yticks(range(len(sites)), sites, fontsize=7)
            _layer_ticks(axis, layers)
        if logarithmic:
            figure.colorbar(image, ax=row, format="%g", ticks=LogLocator(subs=(1, 2, 5))).minorticks_off()
        else:
            figure.colorbar(image, ax=row)
    return figure


def _layer_ticks(axis: "Axes", layers: Sequence[int]) -> None:
    step = max(1, len(layers) // 16)
    axis.set_xticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]], fontsize=7)
    axis.set_xlabel("layer", fontsize=8)


def by_layer(
    scan: Scan, layers: list[int], sites: list[str], state: str, measure: Callable[[Finding], float]
) -> Tensor:
    """[sites, layers]; NaN where a state has no rows."""
    grid = torch.full((len(sites), len(layers)), torch.nan)
    for y, site in enumerate(sites):
        for x, layer in enumerate(layers):
            finding = scan.findings[f"blocks.{layer}.{site}"].get(state)
            if finding is not None:
                grid[y, x] = measure(finding)
    return grid


def _channels(scan: Scan) -> "Figure":
    """Channel maxima of each site from the largest down, a line a layer."""
    from matplotlib import colormaps

    layers, sites = layers_and_sites(scan)
    figure, axes = new_figure(len(STATES), len(sites), (3.2 * len(sites), 5.2), share_y=True)
    for row, state in zip(axes, STATES, strict=True):
        for axis, site in zip(row, sites, strict=True):
            for layer in layers:
                finding = scan.findings[f"blocks.{layer}.{site}"].get(state)
                if finding is None:
                    continue
                maxima = finding.channel_maxima.sort(descending=True).values
                colour = colormaps["viridis"](layer / max(1, layers[-1]))
                axis.plot(range(1, len(maxima) + 1), maxima.clamp_min(1e-9).numpy(), color=colour, linewidth=1)
            axis.set_xscale("log")
            axis.set_yscale("log")
            axis.minorticks_off()
            axis.set_title(f"{site}, {state}", fontsize=9)
            axis.set_xlabel("channels, largest first", fontsize=8)
        row[0].set_ylabel("largest magnitude", fontsize=8)
    figure.suptitle(f"Channel maxima, layers {layers[0]} (dark) to {layers[-1]} (bright)", fontsize=10)
    return figure


def _worst(scan: Scan) -> "Figure":
    """Magnitudes of rows of the worst site, by mask state, on one scale."""
    from matplotlib.colors import LogNorm

    states = [state for state in STATES if state in scan.shown]
    pictures = [pooled(scan.shown[state].abs()) for state in states]
    high = max(float(picture.max()) for picture in pictures) or 1.0
    figure, axes = new_figure(len(states), 1, (10, 3.2 * len(states)))
    channels = scan.shown[states[0]].shape[1]
    for (axis,), state, picture in zip(axes, states, pictures, strict=True):
        image = axis.imshow(
            picture.clamp_min(high * 1e-4).numpy(),
            aspect="auto",
            interpolation="nearest",
            cmap="magma",
            norm=LogNorm(high * 1e-3, high),
            extent=(0, channels, len(picture), 0),
        )
        axis.set_title(f"{scan.worst}, {state} tokens", fontsize=10)
        axis.set_ylabel("token")
    axes[-1][0].set_xlabel("channel")
    figure.colorbar(image, ax=[row[0] for row in axes], label="magnitude")
    return figure


def pooled(picture: Tensor) -> Tensor:
    """[T, K] as at most `MAX_COLUMNS` columns, each the largest of its channels: a mean would hide a peak."""
    width = -(-picture.shape[1] // MAX_COLUMNS)
    return F.max_pool1d(picture[None], width, ceil_mode=True)[0]
