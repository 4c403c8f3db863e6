"""The canvases of calibration on their way through the blocks: inputs of one block at a time, for passes to learn from.

Shape letters: B batch, L sequence, D hidden.
"""

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor
from torch.fx import GraphModule

from passes.fit import Batch
from pipeline.calibrate import BATCH, Canvas
from pipeline.calibration.states import States

Result = TypeVar("Result")


class Stream:
    """Inputs of one block, batch by batch; `compute` and `advance` make them those of the block after."""

    def __init__(self, states: States, frequencies: Tensor, *, batch: int = BATCH) -> None:
        self.batch = batch
        self.canvases = [Canvas(part, frequencies) for part in states.batches(batch)]
        self.outputs: list[Tensor] = []

    @torch.no_grad()
    def enter(self, ends: GraphModule) -> None:
        """The embeddings of every canvas, in the coordinates of the graph given."""
        for canvas in self.canvases:
            canvas.enter(ends)

    @torch.no_grad()
    def compute(self, block: GraphModule) -> None:
        """What this block makes of its inputs, kept for `advance`: the inputs themselves are still needed."""
        self.outputs = list(self.map(lambda batch: block(*batch.inputs)))

    def advance(self) -> None:
        """The outputs that were computed are the next block's inputs."""
        for canvas, x in zip(self.canvases, self.outputs, strict=True):
            canvas.x = x
        self.outputs = []

    def __iter__(self) -> Iterator[Batch]:
        for number, canvas in enumerate(self.canvases):
            states = canvas.states
            yield Batch(
                inputs=canvas.inputs,
                valid=canvas.valid,
                masked=states.masked,
                noise=states.noise,
                first=number * self.batch,
            )

    def map(self, function: Callable[[Batch], Result]) -> Iterator[Result]:
        """Results of `function` in the order of the batches."""
        return map(function, self)
