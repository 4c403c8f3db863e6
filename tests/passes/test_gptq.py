"""GPTQ against the textbook: one column at a time, with the explicit inverse of what is left of the Hessian."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from passes.solvers.clip import clip_ratios
from passes.solvers.gptq import SingularHessianError, gptq, inverse_factor
from passes.solvers.grid import Grid, Levels
from passes.solvers.nearest import round_to_nearest
from tests.passes.grids import textbook_code, textbook_scale, values


def random_hessian(size: int, seed: int, rows: int | None = None) -> Tensor:
    """X^T X of float64 rows whose channels differ in size and hang together."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(rows or 3 * size, size, generator=draw, dtype=torch.float64)
    mix = torch.randn(size, size, generator=draw, dtype=torch.float64) / size**0.5
    x = x @ (mix + torch.diag(torch.rand(size, generator=draw, dtype=torch.float64) * 3))
    return x.T @ x


def group_scale(part: np.ndarray, bits: int, symmetric: bool, clip: bool) -> tuple[np.float32, int]:
    ratio = 1.0
    if clip:
        ratio = float(clip_ratios(torch.from_numpy(part)[None], bits=bits, group=0, symmetric=symmetric))
    return textbook_scale(part, bits, symmetric, ratio)


def textbook(
    weight: Tensor,
    hessian: Tensor,
    *,
    bits: int,
    group: int,
    symmetric: bool,
    damping: float,
    act_order: bool,
    clip: bool,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, scales and zeros by equations 2 and 3 of the paper (those of Optimal Brain Quantization), row by row."""
    w, h = weight.double().numpy().copy(), hessian.double().numpy().copy()
    rows, inner = w.shape
    size = group or inner
    for k in range(inner):
        if h[k, k] == 0:
            h[k, k], w[:, k] = 1, 0
    h += damping * np.mean(np.diag(h)) * np.eye(inner)
    order = sorted(range(inner), key=lambda k: -hessian[k, k]) if act_order else range(inner)
    codes, scales = np.zeros(w.shape, np.int8), np.zeros((rows, inner // size), np.float32)
    zeros = np.zeros(scales.shape, np.int8)
    for n in range(rows):
        table = [group_scale(w[n, g * size : (g + 1) * size], bits, symmetric, clip) for g in range(inner // size)]
        inverse = np.linalg.inv(h)
        for q in order:
            if not act_order and q % size == 0:
                table[q // size] = group_scale(w[n, q : q + size], bits, symmetric, clip)
            scale, zero = table[q // size]
            codes[n, q] = textbook_code(w[n, q], scale, zero, bits, symmetric)
            error = w[n, q] - (float(codes[n, q]) - zero) * float(scale)
            w[n] -= error / inverse[q, q] * inverse[:, q]
            # Strike q from the inverse: Gaussian elimination of its row and column.
            inverse -= np.outer(inverse[:, q], inverse[q]) / inverse[q, q]
        scales[n], zeros[n] = zip(*table, strict=True)
    return codes, scales, zeros


FORMS = st.fixed_dictionaries(
    {
        "bits": st.sampled_from([2, 3, 4, 8]),
        "group": st.sampled_from([0, 2, 4, 12]),
        "symmetric": st.booleans(),
        "damping": st.sampled_from([0.0, 0.01, 0.3]),
        "act_order": st.booleans(),
    }
)


@settings(max_examples=60)
@given(seed=st.integers(0, 2**20), block=st.integers(2, 14), form=FORMS, dead=st.booleans())
def test_codes_are_those_of_the_textbook(seed: int, block: int, form: dict[str, float], dead: bool) -> None:
    hessian = random_hessian(12, seed)
    if dead:
        hessian[5], hessian[:, 5] = 0, 0
    weight = torch.randn(3, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = gptq(weight, hessian, **form, block=block)
    assert_equal(found, textbook(weight, hessian, **form, clip=False))


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
def test_clipped_codes_are_those_of_the_textbook(symmetric: bool, act_order: bool) -> None:
    hessian, weight = random_hessian(8, 1), torch.randn(3, 8, dtype=torch.float64) ** 3
    form = {"bits": 3, "group": 4, "symmetric": symmetric, "damping": 0.01, "act_order": act_order, "clip": True}
    found = gptq(weight, hessian, **form, block=4)
    assert_equal(found, textbook(weight, hessian, **form))


def assert_equal(found: Grid, expected: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    codes, scale, zero = expected
    assert (found.codes.dtype, found.scale.dtype) == (torch.int8, torch.float32)
    assert np.array_equal(found.codes.numpy(), codes)
    # Scales of updated columns follow float64 sums in another order, then are rounded to float32.
    assert np.allclose(found.scale.numpy(), scale, rtol=2**-22, atol=0)
    assert np.array_equal(np.zeros_like(zero) if found.zero is None else found.zero, zero)


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize(("group", "block"), [(0, 16), (8, 16), (32, 16), (8, 128), (16, 24)])
def test_float32_gives_the_same_codes(group: int, block: int, act_order: bool) -> None:
    torch.manual_seed(0)
    hessian, weight = random_hessian(64, 3), torch.randn(40, 64)
    form = {"bits": 4, "group": group, "symmetric": True, "damping": 0.01, "act_order": act_order}
    found = gptq(weight, hessian.float(), **form, block=block)
    expected = gptq(weight.double(), hessian, **form, block=1 if group == 0 else group)
    # A value that lies within float32's rounding of a half may fall on either side, and moves the rest of its row.
    assert int((found.codes != expected.codes).any(1).sum()) <= 1


def output_error(weight: Tensor, grid: Grid, hessian: Tensor) -> Tensor:
    """|W X^T - Q X^T|^2 of each row, float64 [N]."""
    change = values(grid) - weight.double()
    return ((change @ hessian) * change).sum(-1)


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("group", [0, 16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_output_error_is_below_that_of_nearest(bits: int, group: int, symmetric: bool) -> None:
    torch.manual_seed(bits)
    hessian, weight = random_hessian(64, 7), torch.randn(32, 64)
    form = {"bits": bits, "group": group, "symmetric": symmetric}
    plain = output_error(weight, round_to_nearest(weight, **form), hessian).sum()
    for act_order in (False, True):
        grid = gptq(weight, hessian.float(), **form, damping=0.01, block=32, act_order=act_order)
        assert output_error(weight, grid, hessian).sum() <= 0.8 * plain


def test_uncorrelated_inputs_leave_rounding_to_nearest() -> None:
    weight = torch.randn(5, 12)
    hessian = torch.diag(torch.rand(12) + 0.5)
    for symmetric in (True, False):
        found = gptq(weight, hessian, bits=4, group=4, symmetric=symmetric, damping=0.01, block=4)
        expected = round_to_nearest(weight, bits=4, group=4, symmetric=symmetric)
        assert torch.equal(values(found), values(expected))


def test_a_column_without_input_becomes_zero_and_sets_no_scale() -> None:
    hessian, weight = random_hessian(6, 2), torch.randn(2, 6, dtype=torch.float64)
    hessian[3], hessian[:, 3] = 0, 0
    weight[:, 3] = 1000
    for symmetric in (True, False):
        found = gptq(weight, hessian, bits=4, group=0, symmetric=symmetric, damping=0.01, block=4)
        assert values(found)[:, 3].tolist() == [0, 0]
        assert float(found.scale.max()) < 1


def test_factor_is_that_of_the_inverse() -> None:
    hessian, order = random_hessian(9, 4), torch.randperm(9)
    factor = inverse_factor(hessian, order, 0.01)
    damped = hessian[order][:, order] + 0.01 * hessian.diagonal().mean() * torch.eye(9, dtype=torch.float64)
    assert torch.equal(factor, factor.triu())
    assert torch.allclose(factor.T @ factor @ damped, torch.eye(9, dtype=torch.float64), atol=1e-10)


def test_damping_rises_until_a_factor_exists() -> None:
    hessian = torch.full((4, 4), 2.0)  # rank 1
    hessian.diagonal().sub_(0.0005)  # and three eigenvalues just below 0, which 1e-3 of the mean lifts
    factor = inverse_factor(hessian, torch.arange(4), 0.0)
    damped = hessian.double() + 1e-3 * hessian.diagonal().double().mean() * torch.eye(4)
    assert torch.allclose((factor.T @ factor).double(), torch.linalg.inv(damped), rtol=1e-2)


@pytest.mark.parametrize("spoil", [-3.0, torch.nan, torch.inf])
def test_a_hessian_that_stays_singular_is_refused(spoil: float) -> None:
    hessian = torch.eye(4)
    hessian[1, 2] = hessian[2, 1] = spoil
    with pytest.raises(SingularHessianError, match="stays singular with a damping of 1"):
        gptq(torch.randn(2, 4), hessian, bits=4, group=0, symmetric=True, damping=0.01, block=4)


@pytest.mark.parametrize("shape", [(5, 8), (1, 8)])
def test_a_column_lies_in_one_piece(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    strides = []
    fit = Levels.fit

    def watched(levels: Levels, part: Tensor, clip: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
        strides.append(part.T.stride())
        return fit(levels, part, clip)

    monkeypatch.setattr(Levels, "fit", watched)
    weight, hessian = torch.randn(shape), random_hessian(8, 0).float()
    before = weight.clone()
    gptq(weight, hessian, bits=4, group=4, symmetric=True, damping=0.01, block=8)
    assert strides == [(shape[0], 1)] * 2
    assert torch.equal(weight, before)


def test_group_must_divide_the_columns() -> None:
    with pytest.raises(ValueError, match="a group does not divide the columns; got 4 and 6"):
        gptq(torch.ones(2, 6), torch.eye(6), bits=4, group=4, symmetric=True, damping=0.01, block=4)


def test_inputs_are_left_as_they_are() -> None:
    weight, hessian = torch.randn(3, 8), random_hessian(8, 5).float()
    before = weight.clone(), hessian.clone()
    gptq(weight, hessian, bits=4, group=4, symmetric=True, damping=0.01, block=4, act_order=True)
    assert torch.equal(weight, before[0])
    assert torch.equal(hessian, before[1])
