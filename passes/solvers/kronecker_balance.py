"""The best Kronecker stretch of an input against its weight: `balance.py`'s geometric mean, factor by factor.

    S = A kron B,   cost tr(C S) tr(H S^-1)      for fixed B:  A = C_B^-1 # H_B,   C_B, H_B traced over B, B^-1

Each step is the exact minimum over one factor, so the cost never rises.
Shape letters: K channels, a x b = K the Kronecker factors.
"""

import torch
from torch import Tensor

from passes.solvers.balance import geometric_mean, power, ridged

STEPS = 20


def kronecker_stretch(moments: Tensor, gram: Tensor, factors: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Symmetric positive definite P_a [a, a] and P_b [b, b], float64: x -> x (P_a kron P_b), of C and H [K, K]."""
    a, b = factors
    x, w = (ridged(each).reshape(a, b, a, b) for each in (moments, gram))
    left, right = torch.eye(a, dtype=torch.float64), torch.eye(b, dtype=torch.float64)
    for _ in range(STEPS):
        left = _best(torch.einsum("ibjd,bd->ij", x, right), torch.einsum("ibjd,bd->ij", w, torch.linalg.inv(right)))
        right = _best(torch.einsum("ibjd,ij->bd", x, left), torch.einsum("ibjd,ij->bd", w, torch.linalg.inv(left)))
    return power(left, 0.5), power(right, 0.5)


def _best(moments: Tensor, gram: Tensor) -> Tensor:
    """Of determinant one: a factor of one side is a divisor of the other's."""
    mean = geometric_mean(moments, gram)
    scaled: Tensor = mean * torch.exp(-torch.linalg.slogdet(mean).logabsdet / len(mean))
    return scaled
