"""A canvas drawn filling in, in plain ANSI. Shows text of a model: whatever could steer a terminal is taken out."""

from __future__ import annotations

import shutil
import time
import unicodedata
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import TextIO

from pipeline.runner.loop import Step

REDRAW_SECONDS = 1 / 30
HOLE, PLAIN_HOLE = "\u2591", "_"


def printable(text: str) -> str:
    """The text with every control character but newline replaced."""
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text.replace("\t", " "))


def draw_canvas(
    region: Sequence[int], *, mask_id: int, eos_id: int, decode: Callable[[Sequence[int]], str], hole: str = HOLE
) -> str:
    """Text of a region: committed runs decoded, one `hole` a mask, nothing for end-of-text."""
    parts = []
    for kind, run in groupby(region, key=lambda i: "hole" if i == mask_id else "end" if i == eos_id else "text"):
        ids = list(run)
        if kind == "hole":
            parts.append(hole * len(ids))
        elif kind == "text":
            parts.append(printable(decode(ids)))
    return "".join(parts)


def wrap(text: str, columns: int) -> list[str]:
    """Lines of at most `columns` terminal cells; wide characters take two, combining ones none."""
    lines = []
    for paragraph in text.split("\n"):
        line, used = "", 0
        for c in paragraph:
            cells = 0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1
            if used + cells > columns:
                lines.append(line)
                line, used = "", 0
            line, used = line + c, used + cells
        lines.append(line)
    return lines


class CanvasView:
    """Redraws one request in place on a terminal; `erase` leaves the terminal as it was."""

    def __init__(self, stream: TextIO, *, mask_id: int, eos_id: int, decode: Callable[[Sequence[int]], str]) -> None:
        self.stream = stream
        self.mask_id, self.eos_id, self.decode = mask_id, eos_id, decode
        self.hole = HOLE if (stream.encoding or "").lower().startswith("utf") else PLAIN_HOLE
        self.lines_up = 0
        self.drawn = -REDRAW_SECONDS

    def __call__(self, step: Step) -> None:
        now = time.monotonic()
        if now - self.drawn < REDRAW_SECONDS and not step.finished:
            return
        self.drawn = now
        text = draw_canvas(
            step.region.tolist(), mask_id=self.mask_id, eos_id=self.eos_id, decode=self.decode, hole=self.hole
        )
        columns, rows = shutil.get_terminal_size()
        # The last cell of a row makes some terminals wrap at once, and a row that scrolled away cannot be redrawn.
        lines = wrap(text, max(columns - 1, 2))[-max(rows - 1, 1) :]
        self.erase()
        self.stream.write("\n".join(lines))
        self.stream.flush()
        self.lines_up = len(lines) - 1

    def erase(self) -> None:
        """Clear what was drawn; the cursor goes back to where it began."""
        up = f"\x1b[{self.lines_up}A" if self.lines_up else ""
        self.stream.write(f"\r{up}\x1b[J")
        self.stream.flush()
        self.lines_up = 0
