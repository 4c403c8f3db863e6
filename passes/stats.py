"""Moments of the inputs of every linear, split by mask state and noise level. K is the input width of a site."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

STATES = ("unmasked", "masked")


@dataclass
class Moments:
    """Count, sum, sum of squares and largest magnitude of each of K channels, in float64."""

    count: int
    total: Tensor
    squares: Tensor
    amax: Tensor


@dataclass
class Stats:
    """Moments by (site, mask state, noise bucket); bucket b of n holds masked shares in [b/n, (b+1)/n)."""

    num_buckets: int
    table: dict[tuple[str, str, int], Moments] = field(default_factory=dict)

    def add(self, site: str, state: str, bucket: int, rows: Tensor) -> None:
        """Accumulate `rows` [M, K] in float64; no rows, no entry."""
        if not len(rows):
            return
        rows = rows.double()
        self._put((site, state, bucket), Moments(len(rows), rows.sum(0), rows.square().sum(0), rows.abs().amax(0)))

    def merge(self, other: "Stats") -> None:
        """Accumulate what was found elsewhere; sums depend on the order in their last bits."""
        for key, moments in other.table.items():
            self._put(key, moments)

    def _put(self, key: tuple[str, str, int], new: Moments) -> None:
        old = self.table.get(key)
        if old is not None:
            new = Moments(
                old.count + new.count,
                old.total + new.total,
                old.squares + new.squares,
                torch.maximum(old.amax, new.amax),
            )
        self.table[key] = new

    def tensors(self) -> dict[str, Tensor]:
        """Flat form for a file: `site/state/bucket/moment`."""
        flat: dict[str, Tensor] = {}
        for (site, state, bucket), moments in sorted(self.table.items()):
            prefix = f"{site}/{state}/{bucket}"
            flat[f"{prefix}/count"] = torch.tensor([moments.count])
            flat[f"{prefix}/total"] = moments.total
            flat[f"{prefix}/squares"] = moments.squares
            flat[f"{prefix}/amax"] = moments.amax
        return flat

    @classmethod
    def from_tensors(cls, flat: dict[str, Tensor], num_buckets: int) -> "Stats":
        """Inverse of `tensors`."""
        stats = cls(num_buckets)
        for name in flat:
            prefix, _, moment = name.rpartition("/")
            if moment == "count":
                site, state, bucket = prefix.split("/")
                stats.table[site, state, int(bucket)] = Moments(
                    int(flat[name]), flat[f"{prefix}/total"], flat[f"{prefix}/squares"], flat[f"{prefix}/amax"]
                )
        return stats
