"""A basis for gates: what each state loses by it is least, nothing where states live in subspaces of their own."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from passes.gate_transforms import gate_masks, gate_of
from passes.solvers.draws import generator
from passes.solvers.hadamard import random_orthogonal
from passes.solvers.state_basis import moments_along, state_basis


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed, str(shape)), dtype=torch.float64)


def rows_of(count: int, inner: int, rank: int, seed: int) -> Tensor:
    return drawn(count, rank, seed=seed) @ drawn(rank, inner, seed=seed + 1)


def lost(rows: Tensor, dense: Tensor, keeps: Tensor) -> Tensor:
    """Energy of x P (1 - G) for every x, with all matrices written out."""
    return sum(((x @ dense) * (1 - keeps)).square().sum() for x in rows)  # type: ignore[return-value]


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 1), st.integers(0, 50))
def test_moments_are_sums_over_lines_of_the_tile(a: int, b: int, axis: int, seed: int) -> None:
    rows = drawn(7, a * b, seed=seed)
    expected = torch.zeros((a, b)[axis], (a, b)[axis], dtype=torch.float64)
    for x in rows:
        tile = x.reshape(a, b)
        expected += tile @ tile.T if axis == 0 else tile.T @ tile
    assert (moments_along(rows.float(), (a, b), axis) - expected).abs().max() <= 1e-5 * (1 + expected.abs().max())


@given(st.integers(3, 12), st.integers(0, 50), st.data())
def test_the_basis_is_orthogonal_whatever_the_moments(length: int, seed: int, data: st.DataObject) -> None:
    size = data.draw(st.integers(1, (length - 1) // 2))
    ranks = data.draw(st.tuples(st.integers(0, length), st.integers(0, length)))
    masked, unmasked = (rows_of(9, length, rank, seed + 2 * rank) for rank in ranks)
    found = state_basis(masked.T @ masked, unmasked.T @ unmasked, size, generator(seed))
    assert (found.T @ found - torch.eye(length)).abs().max() <= 1e-10


@given(st.integers(1, 3), st.integers(0, 30))
def test_states_in_subspaces_of_their_own_lose_nothing(size: int, seed: int) -> None:
    """Not orthogonal to each other, and leaving each other 2 `size` directions."""
    length = 8
    masked, unmasked = (rows_of(20, length, length - 2 * size, seed + place) for place in (0, 100))
    found = state_basis(masked.T @ masked, unmasked.T @ unmasked, size, generator(seed))
    for rows, other in ((masked, slice(length - size, None)), (unmasked, slice(length - 2 * size, length - size))):
        assert (rows @ found[:, other]).square().sum() <= 1e-18 * rows.square().sum()


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("factors", [(4, 32), (32, 4), (16, 16), (48, 1)])
def test_less_is_lost_than_in_a_random_basis(factors: tuple[int, int], seed: int) -> None:
    """By the textbook: dense transforms, each state's gate, every row; the other factor does not matter."""
    inner, gate = factors[0] * factors[1], gate_of(factors, 16)
    spectrum = 0.8 ** torch.arange(inner)
    masked, unmasked = (drawn(64, inner, seed=seed + place) * spectrum.roll(3 * place) for place in (0, 1))
    moments = (moments_along(rows, factors, gate.axis) for rows in (masked, unmasked))
    draws = generator(seed)
    basis = state_basis(*moments, gate.size, draws)
    keeps = gate_masks(factors, gate).flatten(1)
    totals = []
    for own in (basis, random_orthogonal(len(basis), draws)):
        other = random_orthogonal(factors[1 - gate.axis], draws)
        dense = torch.kron(*(each.contiguous() for each in ((own, other) if gate.axis == 0 else (other, own))))
        totals.append(float(lost(unmasked, dense, keeps[0]) + lost(masked, dense, keeps[1])))
    assert totals[0] <= 0.5 * totals[1]


def test_shared_directions_hold_as_much_of_both_states() -> None:
    masked, unmasked = (rows_of(50, 12, 12, place) * 0.5 ** torch.arange(12) for place in (0, 100))
    moments = [rows.T @ rows for rows in (masked, unmasked)]
    found = state_basis(*moments, 2, generator(0))
    pooled = sum((each / each.trace() for each in moments), torch.zeros(12, 12))
    shared = (found.T @ pooled @ found).diagonal()[:8]  # eight have a Hadamard matrix
    assert (shared - shared.mean()).abs().max() <= 1e-12
    again, other = (state_basis(*moments, 2, generator(seed)) for seed in (0, 1))
    assert torch.equal(found, again)
    assert not torch.equal(found, other)
