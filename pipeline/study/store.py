"""The folder of a study: one JSON file a cell, written whole or not at all, and a lock while a run works in it.

A study that was killed goes on with the cells that are missing, and a cell made from anything else is made again.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import UsageFault
from pipeline.fingerprint import digest_of
from pipeline.folder import LOCK, make_folder, os_faults, take_lock, write_json
from pipeline.study.grid import Cell

if TYPE_CHECKING:
    from typing_extensions import Self

CELLS = "cells"


class StudyFolder:
    """A folder of cells, locked while in use as a context manager.

    Raises UsageFault where the folder holds something else or another run works in it, EnvironmentFault where nothing
    can be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(os.path.abspath(path))
        self.cells = self.path / CELLS

    def __enter__(self) -> Self:
        with os_faults(f"cannot write in {self.path}"):
            self._check_ours()
            make_folder(self.cells)
            self._lock = take_lock(self.path, "study")
            for left in self.path.rglob(".*.tmp"):  # of writes that a kill cut off
                left.unlink()
        return self

    def __exit__(self, *unused: object) -> None:
        os.close(self._lock)

    def _check_ours(self) -> None:
        if not os.path.lexists(self.path):
            return
        if not self.path.is_dir():
            raise UsageFault(f"{self.path} is not a folder; pass another with -o DIR")
        if any(self.path.iterdir()) and not (self.path / LOCK).is_file():
            raise UsageFault(f"{self.path} is not empty and no study of ours; pass another folder with -o DIR")

    def keep(self, cell: Cell, outcome: dict[str, Any]) -> None:
        """Write the outcome of one cell."""
        write_json(self._file(cell), outcome)

    def outcome(self, cell: Cell, fingerprint: str) -> dict[str, Any] | None:
        """The outcome that was kept of this cell, None when there is none made from the same things."""
        try:
            found = json.loads(self._file(cell).read_bytes())
        except (OSError, ValueError):
            return None  # a file that cannot be read is a cell to measure
        return found if isinstance(found, dict) and found.get("fingerprint") == fingerprint else None

    def _file(self, cell: Cell) -> Path:
        # Two folders may bear one name, so the whole cell decides, too.
        name = re.sub("[^A-Za-z0-9.-]+", "-", cell.label)
        return self.cells / f"{name}-{digest_of(vars(cell))[:8]}.json"
