"""fake_quant is the value that the codes of quantize stand for."""

import numpy as np
import pytest
import torch

from plugins.fake_quant import fake_quant
from plugins.quantize import quantize


@pytest.mark.parametrize("a_group", [0, 16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_equals_codes_times_scale(bits: int, symmetric: bool, a_group: int) -> None:
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 5, 48)).astype(np.float32))
    codes, scale, zero = quantize(x, bits=bits, symmetric=symmetric, a_group=a_group, clip_lo=0.9, clip_hi=0.8)
    repeats = a_group or 48
    steps = codes.float() if symmetric else codes.float() + zero.repeat_interleave(repeats, dim=-1).float()
    found = fake_quant(x, bits, symmetric, a_group, clip_lo=0.9, clip_hi=0.8)
    assert torch.equal(found, steps * scale.repeat_interleave(repeats, dim=-1))


def test_a_value_on_the_grid_is_kept() -> None:
    x = torch.tensor([[-7.0, 0.0, 3.0, 7.0]])
    assert torch.equal(fake_quant(x, bits=4), x)
