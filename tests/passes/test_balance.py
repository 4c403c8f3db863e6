"""Balancing transforms against brute-force minimisation of the noise they are to make least."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from passes.solvers.balance import RIDGE, channel_scale, geometric_mean, head_transform, ridged
from passes.solvers.draws import generator

SIZES = st.integers(1, 6)


def drawn(size: int, rows: int, seed: int, name: str) -> Tensor:
    """Sum of x^T x of rows whose channels differ in size."""
    draw = generator(seed, name)
    x = torch.randn(rows, size, generator=draw, dtype=torch.float64)
    x *= torch.exp(2 * torch.randn(size, generator=draw, dtype=torch.float64))
    return x.T @ x


def noise(transform: Tensor, moments: Tensor, gram: Tensor) -> Tensor:
    """tr(P^T C P) tr(P^-1 H P^-T), relative to that of no transform."""
    inverse = torch.linalg.inv(transform)
    made = (transform.mT @ moments @ transform).trace() * (inverse @ gram @ inverse.mT).trace()
    return made / (moments.trace() * gram.trace())


def least(size: int, build: Callable[[Tensor], Tensor], moments: Tensor, gram: Tensor) -> float:
    """The least noise that descent finds from the identity."""
    parameters = torch.zeros(size, size, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([parameters], max_iter=400, line_search_fn="strong_wolfe", tolerance_change=1e-14)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = noise(build(parameters), moments, gram).log()
        torch.autograd.backward(loss)
        return loss

    optimizer.step(closure)
    return float(noise(build(parameters.detach()), moments, gram))


@pytest.mark.parametrize("seed", range(4))
def test_no_transform_of_a_head_makes_less_noise(seed: int) -> None:
    size = 2 + seed
    moments, gram = (drawn(size, 40, seed, name) for name in ("x", "w"))
    found = float(noise(head_transform(moments, gram), ridged(moments), ridged(gram)))
    best = least(size, torch.linalg.matrix_exp, ridged(moments), ridged(gram))
    assert found <= best * (1 + 1e-9)
    assert best <= found * (1 + 1e-4)  # descent comes that near


@pytest.mark.parametrize("seed", range(4))
def test_no_scale_of_channels_makes_less_noise(seed: int) -> None:
    size = 2 + seed
    moments, gram = (drawn(size, 40, seed, name).diagonal() for name in ("x", "w"))
    both = [(each + RIDGE * each.mean()).diag() for each in (moments, gram)]
    found = float(noise(channel_scale(moments, gram).diag(), *both))
    best = least(size, lambda logs: logs.diagonal().exp().diag(), *both)
    assert found <= best * (1 + 1e-9)
    assert best <= found * (1 + 1e-6)


@given(SIZES, st.integers(1, 9), st.integers(0, 99))
def test_balanced_is_never_noisier(size: int, rows: int, seed: int) -> None:
    """Also with fewer rows than channels."""
    moments, gram = (drawn(size, rows, seed, name) for name in ("x", "w"))
    wide = ridged(moments), ridged(gram)
    assert float(noise(head_transform(moments, gram), *wide)) <= 1 + 1e-9
    scale = channel_scale(moments.diagonal(), gram.diagonal()).diag()
    assert float(noise(scale, *(each.diagonal().diag() for each in wide))) <= 1 + 1e-9
    # What the ridge adds to two traces is all that the true ones may lose by it.
    assert float(noise(scale, moments, gram)) <= (1 + RIDGE) ** 2


@given(SIZES, st.integers(0, 99))
def test_the_geometric_mean_solves_its_equation(size: int, seed: int) -> None:
    moments, gram = (ridged(drawn(size, 9, seed, name)) for name in ("x", "w"))
    mean = geometric_mean(moments, gram)
    assert (mean - mean.mT).abs().max() <= 1e-9 * mean.abs().max()
    assert float(torch.linalg.eigvalsh(mean).min()) > 0
    assert (mean @ moments @ mean - gram).abs().max() <= 1e-6 * gram.abs().max()
    root = head_transform(moments, gram)  # ridged once more
    again = geometric_mean(ridged(moments), ridged(gram))
    assert (root @ root - again).abs().max() <= 1e-9 * again.abs().max()


@given(SIZES, st.integers(0, 99))
def test_diagonal_matrices_have_diagonal_means(size: int, seed: int) -> None:
    moments, gram = (drawn(size, 9, seed, name).diagonal() for name in ("x", "w"))
    root = head_transform(moments.diag(), gram.diag())
    scale = channel_scale(moments, gram)
    assert (root - scale.diag()).abs().max() <= 1e-9 * scale.max()


def test_balanced_sides_have_one_energy() -> None:
    moments, gram = drawn(4, 50, 0, "x"), drawn(4, 50, 0, "w")
    root = head_transform(moments, gram)
    inverse = torch.linalg.inv(root)
    x, w = root @ ridged(moments) @ root, inverse @ ridged(gram) @ inverse
    assert (x - w).abs().max() <= 1e-9 * x.abs().max()


def test_nothing_seen_is_left_alone() -> None:
    some, none = drawn(3, 9, 0, "x"), torch.zeros(3, 3)
    for moments, gram in ((some, none), (none, some)):
        assert torch.equal(head_transform(moments, gram), torch.eye(3, dtype=torch.float64))
        assert channel_scale(moments.diagonal(), gram.diagonal()).tolist() == [1.0, 1.0, 1.0]
    silent = torch.tensor([0.0, 4.0]), torch.tensor([1.0, 1.0])
    assert bool(channel_scale(*silent).isfinite().all())
