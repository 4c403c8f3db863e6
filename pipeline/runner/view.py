"""A canvas drawn filling in, in plain ANSI. Shows text of a model: whatever could steer a terminal is taken out."""

from __future__ import annotations

import os
import shutil
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from pipeline.runner.results import Step

Decode = Callable[[Sequence[int]], str]
Run = tuple[str, str]  # a text, and the parameters of the ANSI sequence that colours it; "" is the terminal's own

REDRAW_SECONDS = 1 / 30
HOLE, PLAIN_HOLE = "\u2591", "_"
DIM = "2"
# Least confidence -> colour: green, yellow, red. What was never proposed (forced, or behind an end) has none.
SHADES = ((0.9, "32"), (0.6, "33"), (0.0, "31"))


def printable(text: str) -> str:
    """The text with every control character but newline replaced."""
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text.replace("\t", " "))


def has_colour(stream: TextIO) -> bool:
    """Whether colours may be written: to a terminal, unless NO_COLOR (no-color.org) or TERM=dumb forbids it."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def shade_of(confidence: float) -> str:
    """The colour of a committed id; NaN has none."""
    return next((shade for least, shade in SHADES if confidence >= least), "")


def draw_canvas(
    region: Sequence[int],
    shades: Sequence[str],
    *,
    mask_id: int,
    eos_id: int,
    decode: Decode,
    hole: str = HOLE,
) -> list[Run]:
    """A region as coloured text: committed runs decoded, one `hole` a mask, nothing for end-of-text."""
    runs: list[Run] = []
    kinds = ["hole" if i == mask_id else "end" if i == eos_id else "text" for i in region]
    for kind, places in groupby(range(len(region)), key=kinds.__getitem__):
        at = list(places)
        if kind == "hole":
            runs.append((hole * len(at), DIM))
        elif kind == "text":
            runs.extend(_shaded([region[i] for i in at], [shades[i] for i in at], decode))
    return runs


def _shaded(ids: Sequence[int], shades: Sequence[str], decode: Decode) -> Iterator[Run]:
    """The text of ids that stand together, cut where the colour changes; never inside a letter of several ids."""
    text, start = decode(ids), 0
    for end in range(1, len(ids) + 1):
        if end < len(ids) and shades[end] == shades[end - 1]:
            continue
        known = len(text) if end == len(ids) else len(decode(ids[:end]).rstrip("\ufffd"))
        stop = max(start, min(known, len(text)))
        if stop > start:
            yield printable(text[start:stop]), shades[end - 1]
        start = stop


def wrap(runs: Sequence[Run], columns: int) -> list[list[Run]]:
    """Lines of at most `columns` terminal cells; wide characters take two, combining ones none."""
    lines: list[list[Run]] = [[]]
    used = 0
    for c, shade in ((c, shade) for text, shade in runs for c in text):
        cells = 0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        if c == "\n" or used + cells > columns:
            lines.append([])
            used = 0
        if c != "\n":
            lines[-1].append((c, shade))
            used += cells
    return lines


def paint(runs: Sequence[Run], *, colour: bool) -> str:
    """One line as it is written to the terminal."""
    parts = []
    for shade, together in groupby(runs, key=lambda run: run[1]):
        text = "".join(c for c, _ in together)
        parts.append(f"\x1b[{shade}m{text}\x1b[0m" if colour and shade else text)
    return "".join(parts)


class CanvasView:
    """Redraws one request in place on a terminal, confidence by colour; `erase` leaves the terminal as it was."""

    def __init__(
        self, stream: TextIO, *, mask_id: int, eos_id: int, decode: Decode, colour: bool | None = None
    ) -> None:
        self.stream = stream
        self.mask_id, self.eos_id, self.decode = mask_id, eos_id, decode
        self.colour = has_colour(stream) if colour is None else colour
        self.hole = HOLE if (stream.encoding or "").lower().startswith("utf") else PLAIN_HOLE
        self.shades: list[str] = []
        self.lines_up = 0
        self.drawn = -REDRAW_SECONDS

    def __call__(self, step: Step) -> None:
        self.shades += [""] * (len(step.region) - len(self.shades))  # a canvas may grow
        for position, confidence in zip(step.committed.tolist(), step.confidences.tolist(), strict=True):
            self.shades[position] = shade_of(confidence)
        now = time.monotonic()
        if now - self.drawn < REDRAW_SECONDS and not step.finished:
            return
        self.drawn = now
        runs = draw_canvas(
            step.region.tolist(),
            self.shades,
            mask_id=self.mask_id,
            eos_id=self.eos_id,
            decode=self.decode,
            hole=self.hole,
        )
        columns, rows = shutil.get_terminal_size()
        # The last cell of a row makes some terminals wrap at once, and a row that scrolled away cannot be redrawn.
        lines = wrap(runs, max(columns - 1, 2))[-max(rows - 1, 1) :]
        self.erase()
        self.stream.write("\n".join(paint(line, colour=self.colour) for line in lines))
        self.stream.flush()
        self.lines_up = len(lines) - 1

    def erase(self) -> None:
        """Clear what was drawn; the cursor goes back to where it began."""
        up = f"\x1b[{self.lines_up}A" if self.lines_up else ""
        self.stream.write(f"\r{up}\x1b[J")
        self.stream.flush()
        self.lines_up = 0
