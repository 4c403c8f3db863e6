"""Round to nearest against a slow textbook loop, and what holds of every code and scale."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from passes.solvers.nearest import round_to_nearest

ROWS, INNER = 3, 8
FORMATS = st.tuples(st.sampled_from([2, 3, 4, 8]), st.sampled_from([0, 2, 4, 8]))
ORDINARY = st.one_of(
    st.floats(-(2.0**10), 2.0**10, width=32),
    st.integers(-14, 14).map(lambda n: n / 2),
    st.just(0.0),
    st.just(2.0**-140),
)
WEIGHTS = arrays(np.float32, (ROWS, INNER), elements=ORDINARY)


def textbook(weight: np.ndarray, bits: int, group: int) -> tuple[np.ndarray, np.ndarray]:
    top, size = 2 ** (bits - 1) - 1, group or weight.shape[1]
    codes = np.zeros(weight.shape, np.int8)
    scales = np.zeros((weight.shape[0], weight.shape[1] // size), np.float32)
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], size):
            part = weight[row, start : start + size]
            scale = np.float32(max(abs(value) for value in part)) / np.float32(top)
            scale = scale if scale > 0 else np.float32(1)
            scales[row, start // size] = scale
            for column, value in enumerate(part, start=start):
                codes[row, column] = min(max(round(float(value / scale)), -top), top)  # round() is half to even
    return codes, scales


@given(WEIGHTS, FORMATS)
def test_equals_the_textbook(weight: np.ndarray, form: tuple[int, int]) -> None:
    bits, group = form
    codes, scale = round_to_nearest(torch.from_numpy(weight), bits=bits, group=group)
    expected_codes, expected_scale = textbook(weight, bits, group)
    assert (codes.dtype, scale.dtype) == (torch.int8, torch.float32)
    assert np.array_equal(codes.numpy(), expected_codes)
    assert np.array_equal(scale.numpy(), expected_scale)


@given(arrays(np.float32, (ROWS, INNER), elements=st.floats(-100, 100, width=16)), FORMATS)
def test_error_is_at_most_half_a_step(weight: np.ndarray, form: tuple[int, int]) -> None:
    bits, group = form
    codes, scale = round_to_nearest(torch.from_numpy(weight), bits=bits, group=group)
    steps = scale.double().repeat_interleave(group or INNER, dim=1)
    error = (torch.from_numpy(weight).double() - codes.double() * steps).abs()
    # x / s and s are rounded once each: 2^-24 of at most 127 steps, twice.
    assert bool((error <= steps * (0.5 + 127 * 2**-23)).all())
    peak = codes.reshape(ROWS, -1, group or INNER).abs().amax(dim=-1)
    assert bool(((peak == 2 ** (bits - 1) - 1) | (peak == 0)).all())


@given(WEIGHTS, FORMATS)
def test_a_negated_weight_has_negated_codes(weight: np.ndarray, form: tuple[int, int]) -> None:
    bits, group = form
    codes, scale = round_to_nearest(torch.from_numpy(weight), bits=bits, group=group)
    negated, same = round_to_nearest(torch.from_numpy(-weight), bits=bits, group=group)
    assert torch.equal(negated, -codes)
    assert torch.equal(same, scale)


def test_ties_go_to_even() -> None:
    weight = torch.tensor([[7.0, 0.5, 1.5, -2.5, 6.5, -0.5]])
    codes, scale = round_to_nearest(weight, bits=4, group=0)
    assert scale.tolist() == [[1.0]]
    assert codes.tolist() == [[7, 0, 2, -2, 6, 0]]


def test_a_row_or_group_of_zeros_has_scale_one() -> None:
    codes, scale = round_to_nearest(torch.tensor([[0.0, 0.0, 3.5, -7.0]]), bits=4, group=2)
    assert scale.tolist() == [[1.0, 1.0]]
    assert codes.tolist() == [[0, 0, 4, -7]]


def test_half_weights_are_widened_first() -> None:
    weight = torch.randn(4, 6).to(torch.bfloat16)
    for found, expected in zip(
        round_to_nearest(weight, bits=4, group=3), round_to_nearest(weight.float(), bits=4, group=3), strict=True
    ):
        assert torch.equal(found, expected)


def test_group_must_divide_the_width() -> None:
    with pytest.raises(RuntimeError):
        round_to_nearest(torch.ones(2, 6), bits=4, group=4)


def test_shapes_on_the_meta_device() -> None:
    codes, scale = round_to_nearest(torch.empty(5, 8, device="meta"), bits=4, group=2)
    assert (codes.shape, scale.shape) == ((5, 8), (5, 4))
    assert codes.is_meta
