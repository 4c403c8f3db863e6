"""Shows whether weights outlive the piece of the model that they belong to."""

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from torch import Tensor

from pipeline import calibrate


class Watched:
    """Counts, whenever a piece is captured, how many earlier blocks' weights are still alive."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.alive: list[int] = []
        self.held: list[weakref.ref[Tensor]] = []
        capture = calibrate.capture_piece

        def watched(config: Any, piece: Any, weights: dict[str, Tensor]) -> Any:
            self.alive.append(sum(reference() is not None for reference in self.held))
            graph = capture(config, piece, weights)
            if piece.name != "ends":
                self.held += [weakref.ref(value) for value in (*graph.parameters(), *graph.buffers())]
            return graph

        monkeypatch.setattr(calibrate, "capture_piece", watched)


@contextmanager
def uncollected() -> Iterator[None]:
    """Without the garbage collector, which would hide what is kept too long."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
