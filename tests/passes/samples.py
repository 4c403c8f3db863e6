"""Samples for the tests of passes that learn from activations: random inputs of one graph, batch by batch."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from passes.fit import Batch

Result = TypeVar("Result")


@dataclass(frozen=True)
class Listed:
    """Batches held in a list."""

    batches: Sequence[Batch]

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)

    def map(self, function: Callable[[Batch], Result]) -> Iterator[Result]:
        return map(function, self.batches)


def listed(*inputs: tuple[Tensor, ...], padding: int = 0) -> Listed:
    """A batch for each tuple of inputs, the first [B, Q, ...]; the last `padding` rows of each sample are padding."""
    batches, first = [], 0
    for each in inputs:
        rows = each[0].shape[:2]
        valid = torch.ones(rows, dtype=torch.bool)
        valid[:, rows[1] - padding :] = False
        batches.append(
            Batch(inputs=each, valid=valid, masked=torch.zeros_like(valid), noise=torch.zeros(rows[0]), first=first)
        )
        first += rows[0]
    return Listed(batches)
