"""Greedy block rotations against the paper's steps written out with matrices, and what they are for."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from passes.solvers.draws import generator
from passes.solvers.greedy_rotation import greedy_rotation, spreading


def textbook(x: Tensor, steps: int, spread: Tensor) -> Tensor:
    """One block [M, c], in float64."""
    turn = best = torch.eye(x.shape[1], dtype=torch.float64)
    least = x.abs().max()
    for _ in range(steps):
        turned = x @ turn
        channel = int(torch.argmax(turned.abs().amax(0)))
        swap = torch.eye(x.shape[1], dtype=torch.float64)
        swap[[0, channel]] = swap[[channel, 0]]
        turn = turn @ swap @ spread @ swap
        if (x @ turn).abs().max() < least:
            best, least = turn, (x @ turn).abs().max()
    return best


def spiky(rows: int, width: int, seed: int) -> Tensor:
    x = torch.randn(rows, width, generator=generator(seed, "x"))
    x[:, seed % width] *= 30
    return x


@pytest.mark.parametrize(("blocks", "size", "steps"), [(1, 8, 5), (3, 4, 9), (2, 7, 6), (2, 1, 3)])
def test_equals_the_paper_s_steps(blocks: int, size: int, steps: int) -> None:
    x = spiky(20, blocks * size, seed=blocks)
    found = greedy_rotation(x, size, steps, generator(0, "draw"))
    spread = spreading(size, generator(0, "draw"))
    for number, part in enumerate(x.double().split(size, dim=1)):
        assert (found[number] - textbook(part, steps, spread)).abs().max() <= 1e-12


@given(st.integers(1, 9), st.integers(1, 4), st.integers(0, 9), st.integers(0, 12))
def test_blocks_are_orthogonal_and_never_raise_the_maximum(size: int, blocks: int, seed: int, steps: int) -> None:
    x = spiky(10, size * blocks, seed)
    found = greedy_rotation(x, size, steps, generator(seed))
    assert found.shape == (blocks, size, size)
    assert (found @ found.mT - torch.eye(size)).abs().max() <= 1e-12
    for number, part in enumerate(x.double().split(size, dim=1)):
        assert (part @ found[number]).abs().max() <= part.abs().max() * (1 + 1e-6)


@given(st.integers(1, 40), st.integers(0, 5))
def test_the_first_channel_goes_everywhere_in_equal_parts(size: int, seed: int) -> None:
    found = spreading(size, generator(seed))
    assert (found @ found.T - torch.eye(size)).abs().max() <= 1e-12
    # diag(1, Q) leaves the first of the equal parts and turns the others, whose length stays.
    assert abs(float(found[0, 0]) - size**-0.5) <= 1e-12
    assert abs(float(found[0, 1:].norm()) - (1 - 1 / size) ** 0.5) <= 1e-12


def test_a_large_channel_is_spread() -> None:
    x = spiky(64, 128, seed=3)
    (turn,) = greedy_rotation(x, 128, 64, generator(0)).float()
    assert (x @ turn).abs().max() <= 0.3 * x.abs().max()
