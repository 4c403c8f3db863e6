"""Cayley's map: every triangle gives an orthogonal matrix, as the formula with an explicit inverse says."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from passes.solvers.cayley import cayley
from passes.solvers.draws import generator


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed, str(shape)), dtype=torch.float64)


@given(st.integers(1, 9), st.integers(0, 50), st.sampled_from([1e-3, 1.0, 1e3]))
def test_orthogonal_as_the_textbook_writes_it(size: int, seed: int, spread: float) -> None:
    free = spread * drawn(2, size, size, seed=seed)
    one = torch.eye(size, dtype=torch.float64)
    found = cayley(free)
    assert (found @ found.mT - one).abs().max() <= 1e-12
    for matrix, each in zip(found, free, strict=True):
        skew = torch.tensor([[0.0 if i == j else float(each[i, j]) if i > j else -float(each[j, i])
                              for j in range(size)] for i in range(size)], dtype=torch.float64)  # fmt: skip
        # The condition of I + A is at most 1 + its norm.
        bound = 1e-13 * size * (1 + float(skew.abs().sum()))
        assert (matrix - torch.linalg.inv(one + skew) @ (one - skew)).abs().max() <= bound
        assert abs(float(torch.linalg.det(matrix)) - 1) <= 1e-11


def test_zero_is_the_identity_and_the_upper_triangle_is_not_read() -> None:
    assert torch.equal(cayley(torch.zeros(3, 4, 4)), torch.eye(4).expand(3, 4, 4))
    free = drawn(5, 5)
    assert torch.equal(cayley(free), cayley(free.tril(-1)))


def test_gradients_are_those_of_finite_differences() -> None:
    assert torch.autograd.gradcheck(cayley, (drawn(2, 4, 4).requires_grad_(),))
