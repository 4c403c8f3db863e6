"""Figures and their PNG files; `plots.py` of the study and of the outliers say what is in them.

matplotlib is imported only there and here, and not before it is needed.
"""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline.errors import EnvironmentFault
from pipeline.folder import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def check_matplotlib() -> None:
    """Raise EnvironmentFault where there is none."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as fault:
        raise EnvironmentFault(f"plots need the package matplotlib ({fault}); pip install 'dllmc[study]'") from fault


def new_figure(
    rows: int, columns: int, size: tuple[float, float], *, share_y: bool | Literal["row"] = False
) -> tuple[Figure, list[list[Axes]]]:
    """A figure of `size` inches and its panels; without pyplot, which keeps figures alive and looks for a screen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes: list[list[Any]] = figure.subplots(rows, columns, squeeze=False, sharey=share_y).tolist()
    return figure, axes


def write_figure(path: Path, figure: Figure, *, dots: int) -> None:
    """Write a PNG file atomically, `dots` an inch; any release of matplotlib leaves its own name out."""
    target = BytesIO()
    figure.savefig(target, format="png", dpi=dots, metadata={"Software": None})
    write_bytes(path, target.getvalue())
