"""What every metric returns: sums by sample with their weights, which is what a paired comparison resamples."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Sums:
    """One value and one weight a sample: a masked NLL has bits and tokens, a share of right answers 0 or 1 and 1.

    Raises ValueError for other numbers of values than weights, a weight below 0, or no weight at all.
    """

    values: tuple[float, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.values) != len(self.weights):
            raise ValueError(f"{len(self.values)} values have {len(self.weights)} weights; expected one each")
        if not (all(weight >= 0 for weight in self.weights) and math.fsum(self.weights) > 0):
            raise ValueError(
                f"the weights of {len(self.weights)} samples give no mean: they must be 0 or more, not all 0"
            )

    @property
    def count(self) -> int:
        """How many samples."""
        return len(self.values)

    @property
    def mean(self) -> float:
        """Sum of the values over the sum of the weights."""
        return math.fsum(self.values) / math.fsum(self.weights)

    @classmethod
    def of_shares(cls, values: Iterable[float]) -> "Sums":
        """Samples that weigh the same."""
        kept = tuple(float(value) for value in values)
        return cls(values=kept, weights=(1.0,) * len(kept))

    @classmethod
    def of_json(cls, content: Mapping[str, Any]) -> "Sums":
        """The inverse of `as_json` with samples."""
        return cls(values=tuple(content["values"]), weights=tuple(content["weights"]))


def as_json(result: object, *, samples: bool = True) -> Any:
    """A metric's result as a JSON value; without `samples` only the mean and the number of them are kept."""
    if isinstance(result, Sums):
        rest = {"values": list(result.values), "weights": list(result.weights)} if samples else {"count": result.count}
        return {"mean": result.mean, **rest}
    if is_dataclass(result) and not isinstance(result, type):
        return {field.name: as_json(getattr(result, field.name), samples=samples) for field in fields(result)}
    if isinstance(result, Mapping):
        return {key: as_json(value, samples=samples) for key, value in result.items()}
    if isinstance(result, tuple | list):
        return [as_json(value, samples=samples) for value in result]
    return result
