"""Transforms that share rounding noise between an input and the weight that reads it, in closed form.

    x -> x P,   W -> W P^-T        noise  ~  tr(P^T C P) tr(P^-1 H P^-T),    C = sum of x^T x,  H = W^T W

White noise in proportion to the energy of what is rounded; a rotation after P spreads it and changes neither trace.
Only S = P P^T counts. The best one is the geometric mean C^-1 # H, the one positive definite S with S C S = H; the
best diagonal one has s_k^2 = sqrt(H_kk / C_kk), by the inequality of Cauchy and Schwarz.
Shape letters: K channels, C channels a head.
"""

import torch
from torch import Tensor

RIDGE = 1e-3  # share of the mean diagonal that is added to both: directions nobody saw are not stretched without end


def channel_scale(energy: Tensor, gram: Tensor) -> Tensor:
    """s float64 [K], x_k -> s_k x_k and w_k -> w_k / s_k, of the diagonals [K] of C and H; ones where one is zero."""
    x, w = energy.double(), gram.double()
    if not (bool(x.any()) and bool(w.any())):
        return torch.ones_like(x)
    scale: Tensor = ((w + RIDGE * w.mean()) / (x + RIDGE * x.mean())) ** 0.25
    return scale


def head_transform(moments: Tensor, gram: Tensor) -> Tensor:
    """Symmetric P float64 [C, C] of C and H [C, C], the root of their S; the identity where one is zero."""
    if not (bool(moments.any()) and bool(gram.any())):
        return torch.eye(len(moments), dtype=torch.float64)
    return power(geometric_mean(ridged(moments), ridged(gram)), 0.5)


def geometric_mean(moments: Tensor, gram: Tensor) -> Tensor:
    """C^-1 # H = C^-1/2 (C^1/2 H C^1/2)^1/2 C^-1/2 of positive definite C, H float64 [K, K].

    R. Bhatia, Positive Definite Matrices, 2007, chapter 4.
    """
    root, inverse = power(moments, 0.5), power(moments, -0.5)
    return inverse @ power(root @ gram @ root, 0.5) @ inverse


def ridged(matrix: Tensor) -> Tensor:
    """`matrix` [K, K] in float64 with its ridge."""
    wide = matrix.double()
    return wide + RIDGE * wide.diagonal().mean() * torch.eye(len(wide), dtype=torch.float64)


def power(matrix: Tensor, exponent: float) -> Tensor:
    """Of a symmetric positive definite matrix [K, K]."""
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    powered: Tensor = (vectors * values**exponent) @ vectors.mT
    return powered
