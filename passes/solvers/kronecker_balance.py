"""The best Kronecker stretch of an input against its weight: `balance.py`'s geometric mean, factor by factor.

    S = A kron B,   cost tr(C S) tr(H S^-1)      for fixed B:  A = C_B^-1 # H_B,   C_B, H_B traced over B, B^-1

Each step is the exact minimum over one factor, so the cost never rises.
Shape letters: K channels, a x b = K the Kronecker factors.
"""

import torch
from torch import Tensor

from passes.solvers.balance import RIDGE, geometric_mean, power

STEPS = 10


def kronecker_stretch(moments: Tensor, gram: Tensor, factors: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Symmetric positive definite P_a [a, a] and P_b [b, b], float64: x -> x (P_a kron P_b), of C and H [K, K].

    Identities where one of them is zero.
    """
    left, right = (torch.eye(size, dtype=torch.float64) for size in factors)
    if not (bool(moments.any()) and bool(gram.any())):
        return left, right
    for _ in range(STEPS):
        left = _best(_over_right(moments, right), _over_right(gram, torch.linalg.inv(right)))
        right = _best(_over_left(moments, left), _over_left(gram, torch.linalg.inv(left)))
    return power(left, 0.5), power(right, 0.5)


def _over_right(matrix: Tensor, weight: Tensor) -> Tensor:
    """Sum of matrix[ib, jd] weight[b, d] over b and d, [a, a]."""
    # By strips: at the width of a down projection a copy in float64 is 3 GB.
    strips = torch.split(matrix, len(weight))
    rows = [torch.einsum("bjd,bd->j", torch.unflatten(each.double(), 1, (-1, len(weight))), weight) for each in strips]
    return _ridged(torch.stack(rows), matrix, weight)


def _over_left(matrix: Tensor, weight: Tensor) -> Tensor:
    """Sum of matrix[ib, jd] weight[i, j] over i and j, [b, b]."""
    strips = torch.split(matrix, len(matrix) // len(weight))
    size = len(strips[0])
    total = torch.zeros(size, size, dtype=torch.float64)
    for each, share in zip(strips, weight, strict=True):
        total += torch.einsum("bjd,j->bd", torch.unflatten(each.double(), 1, (-1, size)), share)
    return _ridged(total, matrix, weight)


def _ridged(traced: Tensor, matrix: Tensor, weight: Tensor) -> Tensor:
    """What the trace would be of a matrix with `RIDGE` of its mean diagonal added."""
    ridge = RIDGE * matrix.diagonal().double().mean() * weight.trace()
    return traced + ridge * torch.eye(len(traced), dtype=torch.float64)


def _best(moments: Tensor, gram: Tensor) -> Tensor:
    """Of determinant one: a factor of one side is a divisor of the other's."""
    mean = geometric_mean(moments, gram)
    scaled: Tensor = mean * torch.exp(-torch.linalg.slogdet(mean).logabsdet / len(mean))
    return scaled
