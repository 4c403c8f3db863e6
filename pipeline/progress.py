"""What a run says while it works: one line a stage, a bar on a terminal once a stage takes 2 s, events as JSON.

Lines go to standard error; with `json` one object a line goes to standard output instead. Not on a terminal there is no
bar, but a line every 30 s, so that a log shows life.
"""

from __future__ import annotations

import itertools
import json as json_text
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from typing import TextIO, TypeVar

T = TypeVar("T")

BAR_AFTER_SECONDS = 2.0
REDRAW_SECONDS = 0.2
HEARTBEAT_SECONDS = 30.0
BAR_WIDTH = 24
CLEAR_LINE = "\r\x1b[K"


def clock_text(seconds: float) -> str:
    """`0:07`, `12:30`, `1:02:03`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Stage:
    """One stage under way; the thread that draws reads what `advance` wrote."""

    def __init__(self, label: str, name: str, started: float, *, brief: bool = False) -> None:
        self.label, self.name, self.started, self.brief = label, name, started, brief
        self.done, self.total, self.unit = 0, 0, ""
        self.summary = ""
        self.skipped = False
        self.facts: dict[str, object] = {}

    def advance(self, done: int, total: int, unit: str) -> None:
        """Say that `done` of `total` units are finished."""
        self.done, self.total, self.unit = done, total, unit

    def advance_bytes(self, done: int, total: int) -> None:
        """The same for bytes, shown as megabytes."""
        self.advance(done // 10**6, total // 10**6, "MB")

    def track(self, items: Iterable[T], unit: str, total: int | None = None) -> Iterator[T]:
        """Yield the items and count them; `total` where they have no length."""
        count = total if total is not None else len(items) if isinstance(items, Sized) else 0
        self.advance(0, count, unit)
        for done, item in enumerate(items, start=1):
            yield item
            self.advance(done, count, unit)

    def counter(self, total: int, unit: str) -> Callable[[object], None]:
        """What counts its calls, whatever it is given."""
        done = itertools.count(1)
        self.advance(0, total, unit)
        return lambda _: self.advance(next(done), total, unit)

    def finish(self, summary: str, **facts: object) -> None:
        """What the stage's line says at its end; `facts` are the same for machines."""
        self.summary = summary
        self.facts.update(facts)

    def skip(self, reason: str) -> None:
        """Name why the stage has nothing to do."""
        self.skipped = True
        self.finish(f"skipped: {reason}")

    def line(self, now: float, *, bar: bool = False) -> str:
        """One line: label, count or bar, summary, time."""
        count = f"{self.done}/{self.total} {self.unit}" if self.total else ""
        if bar and self.total:
            filled = BAR_WIDTH * self.done // self.total
            count = f"{'#' * filled}{'.' * (BAR_WIDTH - filled)} {count}"
        return "   ".join(part for part in (self.label, count, self.summary, clock_text(now - self.started)) if part)


class Progress:
    """Reports of one command; `stages` are numbered in the order given to `begin`."""

    def __init__(
        self, *, json: bool = False, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.json = json
        self.stream = stream or (sys.stdout if json else sys.stderr)
        self.terminal = not json and self.stream.isatty()
        self.clock = clock
        self.stages: Sequence[str] = ()
        self._writing = threading.Lock()

    def begin(self, title: str, stages: Sequence[str]) -> None:
        """The first line, and the stages that will come."""
        self.stages = stages
        self.event("begin", title, title=title, stages=list(stages))

    def note(self, text: str) -> None:
        """A line of its own: something the user should know, e.g. what is reused."""
        self.event("note", text, text=text)

    def event(self, kind: str, line: str, **facts: object) -> None:
        """Write a line for people, or an object for machines."""
        text = json_text.dumps({"event": kind, **facts}, ensure_ascii=False) if self.json else line
        with self._writing:
            self.stream.write(f"{CLEAR_LINE if self.terminal else ''}{text}\n")
            self.stream.flush()

    @contextmanager
    def stage(self, name: str, *, brief: bool = False) -> Iterator[Stage]:
        """Report on one stage; its line appears when the block ends, however it ends.

        A `brief` one says nothing before it has taken 2 s, and to machines nothing at all.
        """
        number = f"[{self.stages.index(name) + 1}/{len(self.stages)}] " if name in self.stages else ""
        stage = Stage(f"{number}{name:<10}", name, self.clock(), brief=brief)
        if self.json and not brief:
            self.event("stage_start", "", stage=name)
        stop = threading.Event()
        drawer = threading.Thread(target=self._draw, args=(stage, stop), daemon=True)
        drawer.start()
        status = "failed"
        try:
            yield stage
            status = "skipped" if stage.skipped else "done"
        finally:
            stop.set()
            drawer.join()
            if status == "failed":
                stage.summary = "stopped"
            self._end(stage, status)

    def _end(self, stage: Stage, status: str) -> None:
        now = self.clock()
        seconds = round(now - stage.started, 3)
        if stage.brief and (self.json or seconds < BAR_AFTER_SECONDS):
            return
        facts = {"summary": stage.summary, "seconds": seconds, **stage.facts}
        self.event("stage_end", stage.line(now), stage=stage.name, status=status, **facts)

    def _draw(self, stage: Stage, stop: threading.Event) -> None:
        if self.json:
            return
        while not stop.wait(REDRAW_SECONDS if self.terminal else HEARTBEAT_SECONDS):
            now = self.clock()
            bar = now - stage.started >= BAR_AFTER_SECONDS
            if stage.brief and not bar:
                continue
            line = stage.line(now, bar=self.terminal and bar)
            with self._writing:
                if self.terminal:
                    width = shutil.get_terminal_size().columns - 1
                    self.stream.write(f"{CLEAR_LINE}{line[:width]}")
                else:
                    self.stream.write(f"{line}\n")
                self.stream.flush()
