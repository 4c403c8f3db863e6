"""Maps of attention outputs against the equations written out in numpy, block by block, from the rows themselves."""

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from passes.solvers.draws import generator
from passes.solvers.tac import (
    ALPHAS,
    Affine,
    Moments,
    block_size,
    chosen,
    covariance,
    error,
    identity,
    merged,
    moments,
    paired,
)

Array = npt.NDArray[np.float64]

BLOCK = 4
NUMBERS = [(3e-4, 0.15, 0.55), (3e-4, 0.0, 0.0), (0.1, 1.0, 0.25), (1e-6, 0.3, 1.0)]


def rows_of(seed: int, *, count: int = 60, width: int = 12) -> tuple[Tensor, Tensor]:
    """Paired rows: channels that are mixed, scaled, moved and disturbed."""
    draw = generator(seed, "rows", str(count), str(width))
    full = torch.randn(count, width, generator=draw) @ torch.randn(width, width, generator=draw) + 3
    moved = full * (0.5 + torch.rand(width, generator=draw)) + torch.randn(width, generator=draw)
    return full, moved + 0.3 * torch.randn(count, width, generator=draw)


def in_blocks(rows: Tensor) -> Tensor:
    return torch.unflatten(rows.double(), -1, (-1, BLOCK))


def blocks_of(rows: Tensor, block: int) -> list[Array]:
    return [rows[:, start : start + block].double().numpy() for start in range(0, rows.shape[1], block)]


def second(left: Array, right: Array) -> Array:
    """Population covariance, sum by sum."""
    total = np.zeros((left.shape[1], right.shape[1]))
    for one, other in zip(left - left.mean(0), right - right.mean(0), strict=True):
        total += np.outer(one, other)
    return total / len(left)


def power(matrix: Array, exponent: float) -> Array:
    values, vectors = np.linalg.eigh(matrix)
    powered: Array = vectors @ np.diag(np.maximum(values, 1e-12) ** exponent) @ vectors.T
    return powered


def ridge(quantized: Array, rho: float) -> float:
    found = second(quantized, quantized)
    return rho * max(float(np.trace(found)) / len(found), 1e-8)


def plain_covariance(full: Array, quantized: Array, rho: float, eta: float, alpha: float) -> tuple[Array, Array]:
    one = np.eye(full.shape[1])
    ridged = second(quantized, quantized) + ridge(quantized, rho) * one
    u, values, vt = np.linalg.svd(power(second(full, full), 0.5) @ power(ridged, -0.5))
    smoothed = u @ np.diag((1 - eta) * values + eta * values.mean()) @ vt
    matrix = (1 - alpha) * smoothed + alpha * one
    return matrix, full.mean(0) - matrix @ quantized.mean(0)


def plain_paired(full: Array, quantized: Array, rho: float, alpha: float) -> tuple[Array, Array]:
    """Least squares of the error on the rows, with rows of their own for the ridge."""
    one = np.eye(full.shape[1])
    wrong, rows = full - quantized, quantized - quantized.mean(0)
    stiff = np.sqrt(len(full) * ridge(quantized, rho)) * one
    targets = np.concatenate([wrong - wrong.mean(0), np.zeros_like(one)])
    change, *_ = np.linalg.lstsq(np.concatenate([rows, stiff]), targets, rcond=None)
    matrix = (1 - alpha) * (one + change.T) + alpha * one
    return matrix, full.mean(0) - matrix @ quantized.mean(0)


def plain_error(affine: Affine, full: Tensor, quantized: Tensor) -> float:
    total, block = 0.0, affine.matrix.shape[-1]
    for b, (one, other) in enumerate(zip(blocks_of(full, block), blocks_of(quantized, block), strict=True)):
        for z, y in zip(one, other, strict=True):
            total += float(np.square(z - affine.matrix[b].numpy() @ y - affine.bias[b].numpy()).sum())
    return total / len(full)


def assert_maps(found: Affine, expected: list[tuple[Array, Array]]) -> None:
    for b, (matrix, bias) in enumerate(expected):
        np.testing.assert_allclose(found.matrix[b].numpy(), matrix, rtol=1e-7, atol=1e-9)
        np.testing.assert_allclose(found.bias[b].numpy(), bias, rtol=1e-7, atol=1e-8)


def assert_moments(found: Moments, full: Tensor, quantized: Tensor, block: int) -> None:
    assert found.count == len(full)
    for b, (one, other) in enumerate(zip(blocks_of(full, block), blocks_of(quantized, block), strict=True)):
        pairs = [
            (found.mean, other.mean(0)),
            (found.full_mean, one.mean(0)),
            (found.covariance, second(other, other)),
            (found.error_covariance, second(one - other, one - other)),
            (found.cross, second(one - other, other)),
            (found.full_covariance, second(one, one)),
        ]
        for value, expected in pairs:
            np.testing.assert_allclose(value[b].numpy(), expected, rtol=1e-6, atol=1e-6)


@given(st.integers(1, 9), st.integers(1, 4), st.integers(1, 4), st.lists(st.integers(1, 5), max_size=3))
def test_moments_are_those_of_all_rows(count: int, blocks: int, block: int, more: list[int]) -> None:
    counts = [count, *more]
    full, quantized = rows_of(3, count=sum(counts), width=blocks * block)
    parts = [
        moments(one, other, block)
        for one, other in zip(torch.split(full, counts), torch.split(quantized, counts), strict=True)
    ]
    found = parts[0]
    for part in parts[1:]:
        found = merged(found, part)
    assert_moments(found, full, quantized, block)


@given(st.integers(1, 300), st.integers(1, 64))
def test_the_largest_divisor(width: int, limit: int) -> None:
    assert block_size(width, limit) == max(size for size in range(1, limit + 1) if width % size == 0)


@pytest.mark.parametrize("numbers", NUMBERS)
@pytest.mark.parametrize("size", [1.0, 1e-5])  # the variance of the second is below what the ridge takes
def test_covariance_is_the_papers(size: float, numbers: tuple[float, float, float]) -> None:
    full, quantized = (size * rows for rows in rows_of(1))
    rho, eta, alpha = numbers
    found = covariance(moments(full, quantized, BLOCK), rho=rho, eta=eta, alpha=alpha)
    both = zip(blocks_of(full, BLOCK), blocks_of(quantized, BLOCK), strict=True)
    assert_maps(found, [plain_covariance(*pair, *numbers) for pair in both])


def test_covariance_moves_both_moments_onto_those_of_full_precision() -> None:
    full, quantized = rows_of(2)
    found = covariance(moments(full, quantized, BLOCK), rho=1e-12, eta=0.0, alpha=0.0)
    mapped = torch.einsum("boi,mbi->mbo", found.matrix, in_blocks(quantized)) + found.bias
    after = moments(full, mapped.flatten(-2), BLOCK)
    np.testing.assert_allclose(after.mean, after.full_mean, atol=1e-9)
    np.testing.assert_allclose(after.covariance, after.full_covariance, atol=1e-8)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("rho", [3e-4, 0.5])
def test_paired_is_a_ridge_regression(rho: float, alpha: float) -> None:
    full, quantized = rows_of(4)
    found = paired(moments(full, quantized, BLOCK), rho=rho, alpha=alpha)
    both = zip(blocks_of(full, BLOCK), blocks_of(quantized, BLOCK), strict=True)
    assert_maps(found, [plain_paired(*pair, rho, alpha) for pair in both])


def test_paired_finds_an_affine_map_of_blocks() -> None:
    _, quantized = rows_of(5)
    draw = generator(0, "map")
    matrix = torch.randn(3, BLOCK, BLOCK, generator=draw, dtype=torch.float64)
    bias = torch.randn(3, BLOCK, generator=draw, dtype=torch.float64)
    full = torch.einsum("boi,mbi->mbo", matrix, in_blocks(quantized)) + bias
    made = moments(full.flatten(-2), quantized, BLOCK)
    found = paired(made, rho=1e-13, alpha=0.0)
    np.testing.assert_allclose(found.matrix, matrix, atol=1e-6)
    np.testing.assert_allclose(found.bias, bias, atol=1e-5)
    assert error(found, made) <= 1e-10


@given(st.integers(1, 12), st.integers(1, 3), st.integers(1, 5), st.sampled_from(ALPHAS))
def test_the_error_is_that_of_the_rows(count: int, blocks: int, block: int, alpha: float) -> None:
    full, quantized = rows_of(6, count=count, width=blocks * block)
    other = moments(*rows_of(7, count=5, width=blocks * block), block)
    for affine in (paired(other, rho=3e-4, alpha=alpha), identity(blocks * block, block)):
        found = error(affine, moments(full, quantized, block))
        assert found == pytest.approx(plain_error(affine, full, quantized), rel=1e-9)


def test_alpha_of_one_moves_means_alone() -> None:
    full, quantized = rows_of(8)
    made = moments(full, quantized, BLOCK)
    for found in (covariance(made, rho=3e-4, eta=0.15, alpha=1.0), paired(made, rho=3e-4, alpha=1.0)):
        assert torch.equal(found.matrix, torch.eye(BLOCK, dtype=torch.float64).expand(3, -1, -1))
        expected = in_blocks(full - quantized.double()).mean(0)
        np.testing.assert_allclose(found.bias, expected, atol=1e-12)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_where_nothing_is_lost_paired_is_the_identity(alpha: float) -> None:
    full, _ = rows_of(9)
    made = moments(full, full, BLOCK)
    found, one = paired(made, rho=3e-4, alpha=alpha), identity(12, BLOCK)
    assert torch.equal(found.matrix, one.matrix.double())
    np.testing.assert_allclose(found.bias, one.bias, atol=1e-12)
    assert error(one, made) == 0.0


@given(st.integers(1, 6), st.lists(st.sampled_from(["loud", "constant", "zero", "one lost"]), min_size=4, max_size=4))
def test_singular_covariances_stay_finite(count: int, kinds: list[str]) -> None:
    """Channels that hold one value, in one of the two or in both; fewer rows than channels."""
    full, quantized = rows_of(10, count=count, width=4)
    for channel, kind in enumerate(kinds):
        if kind in ("constant", "zero"):
            full[:, channel] = quantized[:, channel] = 1e4 if kind == "constant" else 0.0
        elif kind == "one lost":
            quantized[:, channel] = 0.0
    made = moments(full, quantized, 4)
    for found in (
        covariance(made, rho=3e-4, eta=0.15, alpha=0.55),
        *(paired(made, rho=1e-30, alpha=a) for a in ALPHAS),
    ):
        assert bool(found.matrix.isfinite().all())
        assert bool(found.bias.isfinite().all())
        mapped = (found.matrix[0] @ quantized.double().mT).mT + found.bias[0]
        np.testing.assert_allclose(mapped.mean(0), full.double().mean(0), rtol=1e-6, atol=1e-4)


def test_the_shrinkage_is_chosen_by_rows_held_out() -> None:
    full, quantized = rows_of(11)
    fitting = moments(full, quantized, BLOCK)
    moved = moments(quantized + (full - quantized).mean(0), quantized, BLOCK)
    found: dict[float, Affine] = {alpha: paired(fitting, rho=3e-4, alpha=alpha) for alpha in ALPHAS}
    taken = set()
    for held_out in (fitting, moved, moments(*rows_of(12), BLOCK)):
        best = min(ALPHAS, key=lambda alpha: error(found[alpha], held_out))
        assert torch.equal(chosen(fitting, held_out, rho=3e-4).matrix, found[best].matrix)
        taken.add(best)
    assert len(taken) > 1
