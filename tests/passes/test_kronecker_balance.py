"""The stretch of two factors against brute force, and against the whole geometric mean where that has factors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from passes.solvers.balance import geometric_mean, power
from passes.solvers.kronecker_balance import kronecker_stretch

SIZES = st.integers(1, 4)


def positive(size: int, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randn(3 * size, size, generator=draw, dtype=torch.float64)
    return rows.T @ (rows * torch.rand(3 * size, 1, generator=draw, dtype=torch.float64))


def cost(moments: Tensor, gram: Tensor, stretch: Tensor) -> float:
    """tr(P^T C P) tr(P^-1 H P^-T)."""
    inverse = torch.linalg.inv(stretch)
    return float((stretch.T @ moments @ stretch).trace() * (inverse @ gram @ inverse.T).trace())


@given(SIZES, SIZES, st.integers(0, 2**20))
def test_never_worse_than_no_stretch_and_symmetric(a: int, b: int, seed: int) -> None:
    moments, gram = positive(a * b, seed), positive(a * b, seed + 1)
    left, right = kronecker_stretch(moments, gram, (a, b))
    for factor in (left, right):
        assert (factor - factor.T).abs().max() <= 1e-9 * factor.abs().max()
        assert torch.linalg.eigvalsh(factor).min() > 0
    # The ridge, and nothing else, may stand between.
    assert cost(moments, gram, torch.kron(left, right)) <= 1.01 * cost(moments, gram, torch.eye(a * b).double())


@pytest.mark.parametrize(("a", "b"), [(1, 6), (6, 1)])
def test_one_factor_is_the_geometric_mean(a: int, b: int) -> None:
    moments, gram = positive(6, 1), positive(6, 2)
    found = torch.kron(*kronecker_stretch(moments, gram, (a, b)))
    whole = power(geometric_mean(moments, gram), 0.5)
    assert cost(moments, gram, found) <= 1.001 * cost(moments, gram, whole)


def test_factors_of_the_data_are_found() -> None:
    (c, h), (d, g) = ((positive(size, 3), positive(size, 4)) for size in (2, 3))
    moments, gram = torch.kron(c, d), torch.kron(h, g)
    found = torch.kron(*kronecker_stretch(moments, gram, (2, 3)))
    whole = power(geometric_mean(moments, gram), 0.5)
    ratio = found / found.trace() - whole / whole.trace()
    assert ratio.abs().max() <= 2e-3  # the ridge's


def test_no_small_change_is_better() -> None:
    moments, gram = positive(6, 5), positive(6, 6)
    left, right = kronecker_stretch(moments, gram, (2, 3))
    least = cost(moments, gram, torch.kron(left, right))
    draw = torch.Generator().manual_seed(7)
    for _ in range(200):
        a, b = (torch.randn(size, size, generator=draw, dtype=torch.float64) for size in (2, 3))
        other = torch.kron(left + 0.05 * (a + a.T), right + 0.05 * (b + b.T))
        assert least <= 1.002 * cost(moments, gram, other)


def test_nothing_to_balance_by_is_left_alone() -> None:
    for pair in ((positive(6, 1), torch.zeros(6, 6)), (torch.zeros(6, 6), positive(6, 1))):
        for factor, size in zip(kronecker_stretch(*pair, (2, 3)), (2, 3), strict=True):
            assert torch.equal(factor, torch.eye(size, dtype=torch.float64))
