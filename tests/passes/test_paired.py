"""Paired weights against least squares with every row written out."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from passes.solvers import grid
from passes.solvers.draws import generator
from passes.solvers.paired import paired_weight

RIDGE = 0.05


def drawn(*shape: int, seed: int, name: str) -> Tensor:
    return torch.randn(shape, generator=generator(seed, name), dtype=torch.float64)


def textbook(weight: np.ndarray, x: np.ndarray, y: np.ndarray, ridge: float) -> np.ndarray:
    """Least |y - x w|^2 + lambda |w - w_0|^2, one output at a time."""
    inner = x.shape[1]
    size = ridge * np.mean([sum(value**2 for value in column) for column in x.T])
    rows = np.concatenate([x, np.sqrt(size) * np.eye(inner)])
    found = []
    for own, wanted in zip(weight, y.T, strict=True):
        right = np.concatenate([wanted, np.sqrt(size) * own])
        found.append(np.linalg.lstsq(rows, right, rcond=None)[0])
    return np.stack(found)


@given(st.integers(1, 9), st.integers(1, 5), st.integers(1, 6), st.integers(0, 99))
def test_equals_damped_least_squares(rows: int, outer: int, inner: int, seed: int) -> None:
    """Also with fewer rows than columns."""
    x, y = drawn(rows, inner, seed=seed, name="x"), drawn(rows, outer, seed=seed, name="y")
    weight = drawn(outer, inner, seed=seed, name="w")
    moments = x.T @ x
    found = paired_weight(weight, moments, y.T @ x, RIDGE)
    assert torch.equal(moments, x.T @ x)
    wanted = torch.from_numpy(textbook(weight.numpy(), x.numpy(), y.numpy(), RIDGE))
    assert (found - wanted).abs().max() <= 1e-9 * max(1.0, float(wanted.abs().max()))


def test_outputs_that_are_there_leave_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid, "CHUNK", 10)  # rows of the weight in several parts
    x, weight = drawn(20, 5, seed=0, name="x"), drawn(7, 5, seed=0, name="w").float()
    found = paired_weight(weight, x.T @ x, (x @ weight.double().T).T @ x, RIDGE)
    assert found.dtype == torch.float32
    assert torch.equal(found, weight)


def test_a_matrix_that_stays_singular_is_refused() -> None:
    moments = torch.zeros(3, 3, dtype=torch.float64)
    with pytest.raises(torch.linalg.LinAlgError):
        paired_weight(torch.ones(2, 3), moments, torch.zeros(2, 3, dtype=torch.float64), RIDGE)
    assert torch.equal(moments, torch.zeros_like(moments))
