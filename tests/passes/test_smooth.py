"""The smoothing scale against its formula, and what it does to the ranges."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from passes.solvers.smooth import SMALLEST, smoothing_scale


@given(
    st.lists(st.tuples(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3)), min_size=1, max_size=9),
    st.floats(0, 1),
)
def test_formula(channels: list[tuple[float, float]], alpha: float) -> None:
    x, w = (torch.tensor(values) for values in zip(*channels, strict=True))
    found = smoothing_scale(x, w, alpha)
    assert found.dtype == torch.float32
    for scale, (x_max, w_max) in zip(found.tolist(), channels, strict=True):
        assert scale == pytest.approx(max(x_max**alpha / w_max ** (1 - alpha), SMALLEST), rel=1e-5)


def test_half_makes_both_sides_equally_hard() -> None:
    x, w = torch.tensor([9.0, 1.0, 0.25]), torch.tensor([1.0, 4.0, 0.04])
    scale = smoothing_scale(x, w, 0.5)
    assert torch.allclose(x / scale, w * scale)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_silent_channels_keep_their_scale(alpha: float) -> None:
    x, w = torch.tensor([0.0, 2.0, 0.0, 2.0]), torch.tensor([1.0, 0.0, 0.0, 2.0])
    assert smoothing_scale(x, w, alpha)[:3].tolist() == [1.0, 1.0, 1.0]
