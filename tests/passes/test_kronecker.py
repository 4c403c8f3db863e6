"""Kronecker transforms against the dense matrix they stand for."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from passes.solvers import kronecker
from passes.solvers.draws import generator
from passes.solvers.hadamard import has_hadamard
from passes.solvers.kronecker import apply_kronecker, factor_pairs, factors, fold_kronecker, hadamard_rotation
from tests.passes.live_bytes import peak_bytes

REAL = {
    128: (8, 16),
    192: (12, 16),
    384: (16, 24),
    3584: (56, 64),
    4096: (64, 64),
    12288: (96, 128),
    18944: (128, 148),
    14336: (112, 128),
    # 43 x 256 and twice that: the only pairs with Hadamard matrices are 2 x 5504 and 4 x 5504.
    11008: (86, 128),
    22016: (128, 172),
}


@given(st.integers(1, 3000))
def test_every_divisor_is_in_a_pair_and_the_closest_pair_first(size: int) -> None:
    pairs = factor_pairs(size)
    assert sorted({factor for pair in pairs for factor in pair}) == [n for n in range(1, size + 1) if size % n == 0]
    assert all(a * b == size and a <= b for a, b in pairs)
    assert pairs == sorted(pairs, key=lambda pair: pair[1] - pair[0])


@pytest.mark.parametrize("size", REAL)
def test_factors_of_real_widths(size: int) -> None:
    assert factors(size) == REAL[size]


@given(st.integers(1, 600))
def test_factors_are_the_closest_pair_and_hadamard_where_that_is_no_dearer_than_twice(size: int) -> None:
    a, b = factors(size)
    assert (a * b, a <= b) == (size, True)
    pairs = [(x, size // x) for x in range(1, size + 1) if size % x == 0 and x * x <= size]
    least = min(map(sum, pairs))
    both = [pair for pair in pairs if has_hadamard(pair[0]) and has_hadamard(pair[1]) and sum(pair) <= 2 * least]
    assert (a, b) == min(both or pairs, key=lambda pair: pair[1] - pair[0])


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 9))
def test_the_factors_act_as_the_dense_matrix(a: int, b: int, seed: int) -> None:
    draw = generator(seed)
    left, right, x = (torch.randn(shape, generator=draw) for shape in ((a, a), (b, b), (2, 3, a * b)))
    dense = torch.kron(left.double(), right.double())
    found = apply_kronecker(x, left, right)
    assert (found.dtype, found.shape) == (x.dtype, x.shape)
    assert (found - x.double() @ dense).abs().max() <= 2.0**-23 * (x.double().abs() @ dense.abs()).max()


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 9))
def test_a_folded_weight_means_what_it_meant(a: int, b: int, seed: int) -> None:
    draw = generator(seed)
    left, right = (torch.eye(n) * 3 + torch.randn(n, n, generator=draw).clamp(-0.5, 0.5) for n in (a, b))
    weight, x = (torch.randn(n, a * b, generator=draw, dtype=torch.float64) for n in (6, 4))
    found = apply_kronecker(x, left, right) @ fold_kronecker(weight, left, right).T
    assert (found - x @ weight.T).abs().max() <= 1e-12 * (x.abs() @ weight.abs().T).max()


def test_weights_are_folded_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = generator(1)
    weight, left, right = (torch.randn(shape, generator=draw) for shape in ((7, 6), (2, 2), (3, 3)))
    whole = fold_kronecker(weight, left, right)
    monkeypatch.setattr(kronecker, "PART", 20)  # rows: 3, 3 and 1
    assert (fold_kronecker(weight, left, right) - whole).abs().max() <= 1e-6 * whole.abs().max()


def test_a_turned_weight_lies_as_the_weight_does() -> None:
    weight = torch.randn(6, 8)
    turned = hadamard_rotation(6, generator(0)).apply(weight.T)
    assert turned.stride() == weight.T.stride()
    assert torch.equal(turned, hadamard_rotation(6, generator(0)).apply(weight.T.contiguous()))


@pytest.mark.parametrize("transposed", [False, True])
def test_turning_a_large_weight_takes_one_copy_of_it(*, transposed: bool) -> None:
    weight = torch.randn(64, 200_000).T if transposed else torch.randn(200_000, 64)
    rotation = hadamard_rotation(64, generator(0))
    assert peak_bytes(lambda: rotation.apply(weight)) <= 1.2 * weight.nbytes
    assert peak_bytes(lambda: fold_kronecker(weight, rotation.left, rotation.right)) <= 1.2 * weight.nbytes


@given(st.integers(1, 60), st.integers(0, 9))
def test_rotations_are_orthogonal_for_every_width(size: int, seed: int) -> None:
    rotation = hadamard_rotation(size, generator(seed))
    dense = rotation.apply(torch.eye(size, dtype=torch.float64))
    assert (dense @ dense.T - torch.eye(size)).abs().max() <= size * 2.0**-50
    x = torch.randn(2, 3, size, generator=generator(seed, "x"))
    turned = rotation.apply(x)
    assert turned.shape == x.shape
    assert (turned - x.double() @ dense).abs().max() <= 2.0**-22 * x.abs().sum(-1).max()
    assert (rotation.undo(turned) - x).abs().max() <= 2.0**-20 * x.abs().sum(-1).max()
    assert torch.equal(turned, hadamard_rotation(size, generator(seed)).apply(x))


def test_one_large_channel_becomes_many_equal_ones() -> None:
    spike = torch.zeros(3584)
    spike[17] = 100.0
    turned = hadamard_rotation(3584, generator(0)).apply(spike)
    assert (turned.abs() - 100 / 3584**0.5).abs().max() <= 1e-5
