"""Orthogonal matrices from free parameters: Cayley's map of a skew-symmetric matrix.

    Q = (I + A)^-1 (I - A),   A = S - S^T,   S strictly lower triangular

Every S gives an orthogonal Q of determinant 1; S = 0 gives the identity, and no eigenvalue of Q is -1. A start other
than the identity is multiplied by Q (`learned_transforms.py`).
"""

import torch
from torch import Tensor


def cayley(lower: Tensor) -> Tensor:
    """Orthogonal [..., n, n] from the strict lower triangle of `lower` [..., n, n]; differentiable."""
    below = lower.tril(-1)
    skew = below - below.mT
    one = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
    # I + A is never singular: the eigenvalues of A are imaginary.
    turned: Tensor = torch.linalg.solve(one + skew, one - skew)
    return turned
