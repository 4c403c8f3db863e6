"""Hadamard matrices (entries +-1, H H^T = n I) from quadratic residues, and the rotations made of them.

    Sylvester    H_2n = [[1, 1], [1, -1]] kron H_n
    Paley I      n = q + 1,    q prime, q = 3 mod 4
    Paley II     n = 2(q + 1), q prime, q = 1 mod 4

(R. Paley, On orthogonal matrices, 1933.) No tables: 12, 20, 28 and 148 come out of 11, 19, 13 and 73.
"""

import math
from functools import cache

import torch
from torch import Tensor

PAIR = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)


def hadamard(size: int) -> Tensor | None:
    """Hadamard matrix int8 [size, size], None where no construction is known here."""
    if size in (1, 2):
        return PAIR[:size, :size].clone()
    if size < 1 or size % 4:
        return None
    half = hadamard(size // 2)
    if half is not None:
        return torch.kron(PAIR, half)
    if _is_prime(size - 1):  # 3 mod 4, since size is a multiple of 4
        return torch.eye(size, dtype=torch.int8) + _bordered(size - 1, -1)
    if (size // 2 - 1) % 4 == 1 and _is_prime(size // 2 - 1):
        own = torch.tensor([[1, -1], [-1, -1]], dtype=torch.int8)
        return torch.kron(_bordered(size // 2 - 1, 1), PAIR) + torch.kron(torch.eye(size // 2, dtype=torch.int8), own)
    return None


@cache
def has_hadamard(size: int) -> bool:
    """Whether `hadamard(size)` is a matrix."""
    return hadamard(size) is not None


def rotation(size: int, generator: torch.Generator) -> Tensor:
    """Random orthogonal float64 [size, size] for row vectors x -> x Q: diag(+-1) H / sqrt(size) where H is known.

    Elsewhere (odd sizes) uniform over the orthogonal matrices.
    """
    matrix = hadamard(size)
    if matrix is None:
        return random_orthogonal(size, generator)
    return signs(size, generator)[:, None] * matrix.double() / math.sqrt(size)


def signs(size: int, generator: torch.Generator) -> Tensor:
    """+-1 with even odds, float64 [size]."""
    return torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1


def random_orthogonal(size: int, generator: torch.Generator) -> Tensor:
    """Haar distributed, float64 [size, size] (Mezzadri, arXiv math-ph/0609050)."""
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    # QR is unique only with a positive diagonal; without it the distribution is not uniform.
    positive: Tensor = q * torch.where(r.diagonal() < 0, -1.0, 1.0)
    return positive


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))


def _bordered(prime: int, corner: int) -> Tensor:
    """Residue symbols chi(j - i) with a border of ones, `corner` down the first column: [prime + 1, prime + 1]."""
    index = torch.arange(prime)
    symbols = torch.full((prime,), -1, dtype=torch.int8)
    symbols[index.square() % prime] = 1
    symbols[0] = 0
    matrix = torch.ones(prime + 1, prime + 1, dtype=torch.int8)
    matrix[0, 0] = 0
    matrix[1:, 0] = corner
    matrix[1:, 1:] = symbols[(index[None, :] - index[:, None]) % prime]
    return matrix
