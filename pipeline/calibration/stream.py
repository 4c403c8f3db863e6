"""The canvases of calibration on their way through the blocks: inputs of one block at a time, for passes to learn from.

Shape letters: B batch, L sequence, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor
from torch.fx import GraphModule

from passes.fit import Batch, CalibrationError, check_learnable
from passes.observe import Observed
from pipeline.calibration.cache import Cache, Disk, Ram
from pipeline.calibration.canvas import Canvas, batch_size
from pipeline.calibration.states import States
from pipeline.calibration.workers import Workers
from pipeline.errors import InputRefused

if TYPE_CHECKING:
    from typing_extensions import Self

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Means:
    """How a calibration is computed, which changes no byte of what it finds.

    `workers` batches at a time; the inputs of blocks lie in `folder`, or in RAM without one.
    """

    workers: int = 1
    folder: Path | None = None


class Stream:
    """Inputs of one block, batch by batch; `compute` and `advance` make them those of the block after.

    Use as a context manager, or `close` it: it has threads and files. Raises InputRefused, with layer and sample, where
    the output of a block, or in `compute` the input of a linear, is not finite or has one value everywhere.
    """

    def __init__(
        self, states: States, frequencies: Tensor, *, batch: int | None = None, means: Means | None = None
    ) -> None:
        means = means or Means()
        self.batch = batch or batch_size(states)
        self.canvases = [Canvas(part, frequencies) for part in states.batches(self.batch)]
        self._block = 0
        self._workers = Workers(means.workers)
        self._cache: Cache = Disk(means.folder) if means.folder else Ram()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    def close(self) -> None:
        """End the threads, remove the files."""
        self._workers.close()
        self._cache.close()

    @torch.no_grad()
    def enter(self, ends: GraphModule) -> None:
        """The embeddings of every canvas, in the coordinates of the graph given."""
        for number, canvas in enumerate(self.canvases):
            self._cache.write(number, canvas.embedded(ends))
        self._cache.advance()
        self._block = 0

    @torch.no_grad()
    def compute(self, block: GraphModule) -> None:
        """What this block makes of its inputs, kept for `advance`: the inputs themselves are still needed."""

        def act(batch: Batch) -> tuple[Tensor, None]:
            watch = Observed(block, lambda site, x, _: check_activations(x, batch, f"the input of {site}"))
            return watch.run(*batch.inputs), None

        for _ in self.through(act):
            pass

    def through(self, function: Callable[[Batch], tuple[Tensor, Result]]) -> Iterator[Result]:
        """The same by a function that finds something on the way: keeps its tensors, gives the rest in order."""

        def act(number: int) -> Result:
            batch = self._batch(number)
            x, result = function(batch)
            check_activations(x, batch, f"the output of blocks.{self._block}")
            self._cache.write(number, x)
            return result

        return self._workers.map(act, range(len(self.canvases)))

    def advance(self) -> None:
        """The outputs that were computed are the next block's inputs."""
        self._cache.advance()
        self._block += 1

    def __iter__(self) -> Iterator[Batch]:
        return map(self._batch, range(len(self.canvases)))

    def map(self, function: Callable[[Batch], Result]) -> Iterator[Result]:
        """Results of `function` in the order of the batches."""
        return self._workers.map(lambda number: function(self._batch(number)), range(len(self.canvases)))

    def _batch(self, number: int) -> Batch:
        canvas = self.canvases[number]
        return Batch(
            inputs=canvas.inputs_of(self._cache.read(number)),
            valid=canvas.valid,
            masked=canvas.states.masked,
            noise=canvas.states.noise,
            first=number * self.batch,
        )


def check_activations(x: Tensor, batch: Batch, what: str) -> None:
    """`check_learnable` where no pass runs: raises InputRefused."""
    try:
        check_learnable(x, batch, what)
    except CalibrationError as fault:
        raise InputRefused(str(fault)) from fault
