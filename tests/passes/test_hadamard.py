"""Hadamard matrices against their definition, and the rotations made of them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from passes.solvers.draws import generator
from passes.solvers.hadamard import hadamard, has_hadamard, random_orthogonal, rotation

KNOWN = {1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 60, 64, 72, 76, 80, 84, 96, 104, 108, 112, 124, 128, 148}


@given(st.integers(-4, 200))
def test_rows_are_orthogonal_wherever_a_matrix_is_made(size: int) -> None:
    matrix = hadamard(size)
    assert has_hadamard(size) == (matrix is not None)
    assert matrix is not None or size not in KNOWN
    if matrix is not None:
        assert matrix.shape == (size, size)
        assert bool((matrix.abs() == 1).all())
        assert torch.equal(matrix.int() @ matrix.int().T, size * torch.eye(size, dtype=torch.int32))


@pytest.mark.parametrize("size", sorted(KNOWN | {172 - 24, 384, 1024}))
def test_sizes_that_models_need_are_known(size: int) -> None:
    assert has_hadamard(size)


def test_powers_of_two_are_sylvester_s() -> None:
    pair = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
    found = hadamard(8)
    assert found is not None
    assert torch.equal(found, torch.kron(pair, torch.kron(pair, pair)))


@given(st.integers(1, 40), st.integers(0, 9))
def test_rotations_are_orthogonal_and_keyed(size: int, seed: int) -> None:
    found = rotation(size, generator(seed))
    assert found.dtype == torch.float64
    assert (found @ found.T - torch.eye(size)).abs().max() <= size * 2.0**-50
    assert torch.equal(found, rotation(size, generator(seed)))
    if has_hadamard(size):
        assert (found.abs() - size**-0.5).abs().max() <= 2.0**-52  # every channel goes everywhere in equal parts


def test_random_orthogonal_matrices_have_no_preferred_sign() -> None:
    draw = generator(0)
    corners = torch.stack([random_orthogonal(3, draw).diagonal() for _ in range(500)])
    # Of 500 Haar draws an entry has mean 0 and variance 1/3: five standard errors.
    assert bool((corners.mean(0).abs() <= 5 * (1 / 3 / 500) ** 0.5).all())
