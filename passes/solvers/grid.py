"""The grid of a weight: one scale, and for skewed weights one integer zero, for each row or group of a row.

    symmetric    s = c amax / top           q = clip(rint(w / s), -top, top)            w ~ s q
    asymmetric   s = c (hi - lo) / steps    q = clip(rint(w / s) + z, low, high)        w ~ s (q - z)
                 z = clip(rint(low - c lo / s), low, high),   hi = max(w, 0),   lo = min(w, 0)

top = 2^(b-1) - 1, low = -2^(b-1), high = top, steps = 2^b - 1, c is the clip ratio; rint is half to even, s = 1 where
it would be 0. Shape letters: N rows, K columns, G groups, g columns of one group.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from plugins.int4 import code_range

CHUNK = 1 << 22  # weights that are widened at a time: the head of an 8B model must not be copied whole


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A weight on its grid: codes int8 [N, K], scale float32 [N, G], zero int8 [N, G] or None when symmetric."""

    codes: Tensor
    scale: Tensor
    zero: Tensor | None = None


class Levels:
    """The codes of one format and the arithmetic on them; a zero is a float, and 0 when symmetric."""

    def __init__(self, bits: int, symmetric: bool) -> None:
        self.bits, self.symmetric = bits, symmetric
        self.low, self.high = code_range(bits, symmetric)

    def fit(self, part: Tensor, clip: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
        """Scale float32 [...] and zero [...] of floats `part` [..., g]; `clip` [...] is the ratio c."""
        return self.fit_range(*self.range_of(part), clip)

    def range_of(self, part: Tensor) -> tuple[Tensor, Tensor]:
        """Ends [...] of what a grid for floats `part` [..., g] spans: lo and hi, or -amax and amax when symmetric."""
        if self.symmetric:
            amax = part.abs().amax(dim=-1)
            return -amax, amax
        return part.amin(dim=-1).clamp(max=0), part.amax(dim=-1).clamp(min=0)

    def fit_range(self, low: Tensor, high: Tensor, clip: Tensor | float) -> tuple[Tensor, Tensor]:
        """As `fit`, from what `range_of` gave: a search over ratios looks at the floats once."""
        if self.symmetric:
            scale = _positive(high * clip / float(self.high))
            return scale, torch.zeros_like(scale)
        low, high = low * clip, high * clip
        scale = _positive((high - low) / float(self.high - self.low))
        return scale, (self.low - low / scale).round().clamp(self.low, self.high)

    def round(self, part: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Codes, still as floats, of floats that broadcast with `scale` and `zero`."""
        return ((part / scale).round() + zero).clamp(self.low, self.high)

    def value(self, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """What codes stand for."""
        return (codes - zero) * scale


def _positive(scale: Tensor) -> Tensor:
    scale = scale.float()
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def row_chunks(weight: Tensor) -> Iterator[slice]:
    """Slices of the rows of [N, K] that hold at most CHUNK weights, or one row."""
    rows, inner = weight.shape
    size = max(1, CHUNK // max(1, inner))
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))
