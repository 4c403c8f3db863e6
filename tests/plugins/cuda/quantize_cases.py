"""Rows that are hard to quantise, and how far a kernel's codes may stand from the reference's."""

from typing import Any

import torch
from torch import Tensor

from bench.gpu.bounds import near_codes
from plugins.int4 import pack_codes
from plugins.quantize import quantize

# float32: one operation is off by at most half of this.
EPSILON = 2.0**-23


def hard_rows(inner: int, seed: int = 0) -> Tensor:
    """Five rows with outliers, then the odd ones: zeros, one sign, ties, tiny values."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(5, inner, generator=random)
    x *= torch.where(torch.rand(5, inner, generator=random) < 0.02, 50.0, 1.0)
    steps = torch.arange(inner) % 15 - 7.0
    odd = [torch.zeros(inner), -torch.rand(inner, generator=random) - 1, torch.rand(inner, generator=random) + 1]
    odd += [steps, steps / 2, torch.arange(inner) % 29 / 2 - 4.0, steps * 1e-6]
    return torch.cat([x, torch.stack(odd)])


def assert_equal(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], bits: int) -> None:
    assert torch.equal(found[0], pack_codes(expected[0], bits))
    assert torch.equal(found[1], expected[1])
    assert torch.equal(found[2], expected[2])


def assert_near(found: tuple[Tensor, ...], y: Tensor, error: Tensor, options: dict[str, Any]) -> Tensor:
    """Where codes differ, after `near_codes` found none, no scale and no zero too far from those of y."""
    codes, scale, zero = quantize(y, **options)
    near = near_codes(found, (pack_codes(codes, options.get("bits", 4)), scale, zero), y, error, options)
    for name, wrong in near.wrong.items():
        assert not wrong.any(), f"{name}: {int(wrong.sum())} of {wrong.numel()} wrong"
    return near.apart


def assert_rare(*apart: Tensor) -> None:
    """At most 0.1 % of all these codes differ, and five standard deviations of a count at that rate."""
    differing, codes = sum(int(a.sum()) for a in apart), sum(a.numel() for a in apart)
    usual = 1e-3 * codes
    assert differing <= usual + 5 * usual**0.5, f"{differing} of {codes} codes differ"
