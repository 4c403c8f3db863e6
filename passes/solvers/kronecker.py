"""Kronecker factors of a width, and transforms x -> x (left kron right) of row vectors, applied by their factors.

    x as a tile X [a, b]:    x (left kron right)  =  left^T X right        2 K (a + b) operations instead of 2 K^2

Shape letters: K channels, a x b = K the factors, M rows.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from passes.solvers.hadamard import has_hadamard, rotation, signs

PART = 1 << 18  # values of a weight turned at a time: float64 and its products are small beside an LM head
DEARER = 2  # times the operations of the closest pair that a pair with Hadamard matrices may cost


def factor_pairs(size: int) -> list[tuple[int, int]]:
    """All (a, b) with a x b = size and a <= b, the closest pair first."""
    return [(a, size // a) for a in range(math.isqrt(size), 0, -1) if size % a == 0]


def factors(size: int) -> tuple[int, int]:
    """(a, b) with a x b = size and a <= b: the closest pair that has Hadamard matrices, else the closest pair.

    3584 = 56 x 64, 12288 = 96 x 128, 18944 = 128 x 148; 11008 = 86 x 128, since 2 x 5504 would cost 26 times as much.
    """
    pairs = factor_pairs(size)
    affordable = (pair for pair in pairs if sum(pair) <= DEARER * sum(pairs[0]))
    return next((pair for pair in affordable if all(map(has_hadamard, pair))), pairs[0])


def apply_kronecker(rows: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """x (left kron right) for each x of `rows` [..., K], summed in float64, in the type of `rows`."""
    tiles = torch.unflatten(rows.double(), -1, (left.shape[0], right.shape[0]))
    return (left.double().T @ tiles @ right.double()).flatten(-2).to(rows.dtype)


def fold_kronecker(weight: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """W (left kron right)^-T of `weight` [N, K]: the linear that reads x (left kron right) and means W x.

    Raises torch.linalg.LinAlgError for a singular factor.
    """
    inverse_left = torch.linalg.inv(left.double()).T
    inverse_right = torch.linalg.inv(right.double()).T
    return by_parts(weight, lambda rows: apply_kronecker(rows, inverse_left, inverse_right))


@dataclass(frozen=True)
class Rotation:
    """Orthogonal x -> (x * signs) (left kron right): a randomised Hadamard transform that is never written out."""

    signs: Tensor
    left: Tensor
    right: Tensor

    def apply(self, rows: Tensor) -> Tensor:
        """Rows [..., K] turned, summed in float64, in their own type."""
        return by_parts(rows, lambda x: apply_kronecker(x.double() * self.signs, self.left, self.right))

    def undo(self, rows: Tensor) -> Tensor:
        """Inverse of `apply`."""
        return by_parts(rows, lambda x: apply_kronecker(x.double(), self.left.T, self.right.T) * self.signs)


def hadamard_rotation(size: int, generator: torch.Generator) -> Rotation:
    """Randomised Hadamard of `size` channels; a factor without a Hadamard matrix is a random orthogonal one."""
    left, right = (rotation(factor, generator) for factor in factors(size))
    return Rotation(signs(size, generator), left, right)


def by_parts(rows: Tensor, turn: Callable[[Tensor], Tensor]) -> Tensor:
    """`turn` of rows [..., K], some at a time, in the type and the order in memory of `rows`: one copy and no more."""
    flat = rows.reshape(-1, rows.shape[-1])
    made, size = torch.empty_like(flat), max(1, PART // max(1, flat.shape[-1]))
    for part, place in zip(torch.split(flat, size), torch.split(made, size), strict=True):
        place.copy_(turn(part))
    return made.reshape(rows.shape)
