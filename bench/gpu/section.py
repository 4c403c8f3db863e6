"""A part of the measurements: items that are measured one by one, and a file that grows with each.

A section that is interrupted goes on with the items that its file lacks; a file of another device, another torch or
other kernels is begun anew.
"""

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from bench.gpu.machine import Machine

Row = dict[str, Any]
Item = tuple[str, Callable[[], Row]]
CLOCKS_EVERY_S = 10.0  # asking the driver takes a while


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the user asked for; with `every` above 1 no section counts as complete."""

    machine: Machine
    work: Path
    seed: int
    deadline: float
    methods: tuple[str, ...]
    every: int = 1

    @property
    def seconds_left(self) -> float:
        """Of the budget."""
        return self.deadline - time.monotonic()


@dataclass(frozen=True, kw_only=True)
class Section:
    """`items` names what is measured, in order; an item returns its row, `said` puts a row into one line.

    `slowest_s` is kept free for one item.
    """

    name: str
    about: str
    items: Callable[[Plan], Iterator[Item]]
    said: Callable[[Row], str]
    slowest_s: float


def read_rows(work: Path, name: str) -> dict[str, Any]:
    """The file of a section, or an empty one; a file that cannot be read counts as empty, and a line says so."""
    path, empty = work / f"{name}.json", {"complete": False, "rows": {}}
    if not path.is_file():
        return empty
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or not isinstance(content.get("rows"), dict):
            raise ValueError("no rows in it")
    except (OSError, ValueError) as reason:
        print(f"{path} cannot be read and counts as empty: {reason}")
        return empty
    return empty | content


def _write(path: Path, content: dict[str, Any]) -> None:
    part = path.with_name(f"{path.name}.{os.getpid()}")
    part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def _fresh(plan: Plan) -> dict[str, Any]:
    return {
        "identity": plan.machine.identity(),
        "machine": plan.machine.describe(),
        "seed": plan.seed,
        "complete": False,
        "rows": {},
    }


def measure(section: Section, plan: Plan, again: bool) -> bool:
    """Measure what is missing, everything with `again`; False when the budget ended first."""
    plan.work.mkdir(parents=True, exist_ok=True)
    path = plan.work / f"{section.name}.json"
    content = read_rows(plan.work, section.name)
    if again or content.get("identity") != plan.machine.identity():
        content = _fresh(plan)
    read_clocks = -CLOCKS_EVERY_S
    for key, item in section.items(plan):
        if key in content["rows"]:
            continue
        if plan.seconds_left < section.slowest_s:
            print(f"{section.name}: the budget ends before {key}; the same command goes on from here")
            return False
        start = time.monotonic()
        row = item()
        emulated = "emulated, no measurement: " if plan.machine.emulated else ""
        print(f"{section.name} {key}: {emulated}{section.said(row)}", flush=True)
        row["taken_s"] = round(time.monotonic() - start, 2)
        if time.monotonic() - read_clocks >= CLOCKS_EVERY_S:
            row["clocks"], read_clocks = plan.machine.clocks(), time.monotonic()
        content["rows"][key] = row
        content["date"] = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M")
        _write(path, content)
    content["complete"] = plan.every == 1
    _write(path, content)
    return True
