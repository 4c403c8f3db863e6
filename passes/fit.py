"""What passes of a method may learn from: samples of a piece's inputs, a seed, and numbers kept for the whole graph.

A pass runs twice: on a piece with weights and samples, and on the whole graph without either. Tensors it adds reach the
whole graph through the sidecar files by name; what ends up as an attribute of a node goes through `numbers`.
Shape letters: B batch, Q query rows, K channels.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from torch import Tensor
from torch.fx import GraphModule

Result = TypeVar("Result")
K = TypeVar("K", bound=Hashable)


class CalibrationError(ValueError):
    """Nothing can be learned from these activations; the model or the samples are at fault, not the pass."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Inputs of a piece as its graph takes them; `valid` and `masked` bool [B, Q], `noise` [B].

    `first` is the number of its first sample among all.
    """

    inputs: tuple[Tensor, ...]
    valid: Tensor
    masked: Tensor
    noise: Tensor
    first: int = 0


def check_learnable(x: Tensor, batch: Batch, what: str) -> None:
    """Raise CalibrationError unless the valid rows of each sample in `x` [B, Q, K] are finite and not all one value."""
    for row, valid in enumerate(batch.valid):
        low, high = x[row, valid].aminmax()
        fault = "has values that are not finite" if not (low.isfinite() and high.isfinite()) else ""
        fault = f"is {float(low) + 0.0:.6g} everywhere" if not fault and low == high else fault
        if fault:
            raise CalibrationError(
                f"{what} {fault} in calibration sample {batch.first + row}; nothing can be learned from it: check the "
                "weights of the model, or choose other text with --set calibration.source=file:PATH"
            )


def summed(parts: Iterable[dict[K, Tensor]]) -> dict[K, Tensor]:
    """What each key has over all parts, added up in their order."""
    totals: dict[K, Tensor] = {}
    for part in parts:
        totals |= {key: totals[key] + found if key in totals else found for key, found in part.items()}
    return totals


class Samples(Protocol):
    """Batches that can be walked through as often as needed."""

    def __iter__(self) -> Iterator[Batch]: ...

    def map(self, function: Callable[[Batch], Result]) -> Iterator[Result]:
        """Results in the order of the batches, whoever computed them; what is summed is summed in that order."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """`samples` are None on shapes alone and for methods without calibration; `numbers` are filled on weights.

    `tensors` are what a method's rewriting leaves for its solving; they go with the piece. A method that pairs has the
    same batches once more as `quantized`, as the quantised blocks before give them, and its `reference`: this piece as
    rewritten, in float.
    """

    samples: Samples | None = None
    quantized: Samples | None = None
    reference: GraphModule | None = None
    seed: int = 0
    numbers: dict[str, float] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
