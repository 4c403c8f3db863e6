"""Straight-through quantisers: values of the real ones to the bit, gradients of the formula as a textbook writes it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from passes.solvers.draws import generator
from passes.solvers.nearest import round_to_nearest
from passes.solvers.straight_through import (
    fake_quant_through,
    quantize_weight_through,
    round_through,
    symmetric_through,
)
from plugins.dequantize import dequantize
from plugins.fake_quant import fake_quant
from plugins.op import float32

Gradients = tuple[Tensor, ...]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed, str(shape)))


def with_odd_rows(x: Tensor) -> Tensor:
    """A row of zeros, one of a single sign, one whose steps are halves."""
    x[0] = 0
    x[1] = x[1].abs()
    x[2] = torch.arange(x.shape[-1]) - 3.5
    return x


@given(st.sampled_from([4, 8]), st.booleans(), st.sampled_from([0, 4]), st.integers(0, 20), st.floats(0.3, 1))
def test_activations_have_the_values_of_the_op(bits: int, symmetric: bool, group: int, seed: int, clip: float) -> None:
    x = with_odd_rows(drawn(5, 8, seed=seed))
    low, high = torch.tensor([clip, 1.3 - clip])
    found = fake_quant_through(x, bits=bits, symmetric=symmetric, a_group=group, clip_lo=low, clip_hi=high)
    assert torch.equal(found, fake_quant(x, bits, symmetric, group, float32(clip), float(high)))


@given(st.sampled_from([3, 4, 8]), st.sampled_from([0, 4]), st.integers(0, 20))
def test_weights_have_the_values_of_the_solver(bits: int, group: int, seed: int) -> None:
    weight = with_odd_rows(drawn(5, 8, seed=seed))
    clip = 0.4 + 0.6 * torch.rand(5, 2 if group else 1, generator=generator(seed))
    grid = round_to_nearest(weight, bits=bits, group=group, clip=clip)
    found = quantize_weight_through(weight, bits=bits, w_group=group, clip=clip)
    assert torch.equal(found, dequantize(grid.codes, grid.scale, bits, group))


def textbook(rows: Tensor, clip: Tensor, limit: int) -> Tensor:
    """One element at a time; rounding adds a constant."""
    made = []
    for row, ratio in zip(rows, clip.expand(len(rows), 1), strict=True):
        largest = row[0].abs()
        for x in row[1:]:
            largest = x.abs() if x.abs() > largest else largest
        scale = largest * ratio[0] / limit
        for x in row:
            step = x / scale
            code = step + (step.round() - step).detach()
            code = code.sign().detach() * limit if code.abs() > limit else code
            made.append(code * scale)
    return torch.stack(made).reshape(rows.shape)


def gradients(function: object, rows: Tensor, clip: Tensor, limit: int, seed: int) -> Gradients:
    leaves = (rows.clone().requires_grad_(), clip.clone().requires_grad_())
    value = function(*leaves, limit)  # type: ignore[operator]
    found: Gradients = torch.autograd.grad(value, leaves, drawn(*rows.shape, seed=seed + 1).double())
    return found


@given(st.sampled_from([1, 7]), st.booleans(), st.floats(0.3, 1), st.integers(0, 20))
def test_gradients_are_those_of_the_textbook(limit: int, shared: bool, ratio: float, seed: int) -> None:
    rows = drawn(3, 6, seed=seed).double()
    clip = torch.full(() if shared else (3, 1), ratio, dtype=torch.float64)
    found = gradients(symmetric_through, rows, clip, limit, seed)
    for one, other in zip(found, gradients(textbook, rows, clip, limit, seed), strict=True):
        assert one.shape == other.shape
        assert (one - other).abs().max() <= 1e-12 * (1 + other.abs().max())


def test_a_row_of_zeros_has_no_gradient_but_that_of_its_values() -> None:
    rows, clip = torch.zeros(2, 4, requires_grad=True), torch.ones(2, 1, requires_grad=True)
    by_rows, by_clip = torch.autograd.grad(symmetric_through(rows, clip, 7).sum(), (rows, clip))
    assert torch.equal(by_rows, torch.ones(2, 4))
    assert torch.equal(by_clip, torch.zeros(2, 1))


@pytest.mark.parametrize("symmetric", [True, False])
def test_clip_ratios_have_gradients_where_something_is_clipped(symmetric: bool) -> None:
    x = drawn(3, 8)
    clips = torch.full((2,), 0.5, requires_grad=True)
    low, high = clips
    value = fake_quant_through(x, bits=4, symmetric=symmetric, a_group=0, clip_lo=low, clip_hi=high)
    (found,) = torch.autograd.grad((value - x).square().sum(), clips)
    assert found[1] < 0  # half of the range is too little
    assert (found[0] < 0) != symmetric


def test_rounding_is_exact_and_its_slope_one() -> None:
    x = torch.tensor([0.5, 1.5, -2.5, 1e9, 0.3], requires_grad=True)
    value = round_through(x)
    assert value.tolist() == [0, 2, -2, 1e9, 0]
    (slope,) = torch.autograd.grad(value.sum(), x)
    assert torch.equal(slope, torch.ones(5))
