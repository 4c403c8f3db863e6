"""Rotate blocks of channels step by step, each time spreading the channel that holds a block's largest value.

    step      R <- R E_d G E_d,    d the channel of max |X R|,    E_d swaps it with the first,    G = S diag(1, Q)
    result    the R of the steps (none among them) with the least max |X R|

S has a first row of equal entries, Q is random orthogonal (DuQuant, arXiv 2406.01721, equations 3 and 4). Every block
has its own R; its code gives all blocks one. Shape letters: M rows, K channels, c channels a block.
"""

import torch
from torch import Tensor

from passes.solvers.hadamard import random_orthogonal


def greedy_rotation(rows: Tensor, block: int, steps: int, generator: torch.Generator) -> Tensor:
    """Orthogonal blocks float64 [K/c, c, c] for `rows` [M, K]; `block` is c and divides K."""
    x = torch.unflatten(rows.float(), -1, (-1, block)).transpose(0, 1)
    spread = spreading(block, generator)
    turn = torch.eye(block, dtype=torch.float64).repeat(len(x), 1, 1)
    best, least = turn.clone(), x.abs().amax(dim=(1, 2))
    for _ in range(steps):
        step = _swapped(spread, x.abs().amax(dim=1).argmax(dim=1))
        x, turn = x @ step.float(), turn @ step
        peak = x.abs().amax(dim=(1, 2))
        better = peak < least
        best[better], least[better] = turn[better], peak[better]
    return best


def spreading(size: int, generator: torch.Generator) -> Tensor:
    """G float64 [c, c]: a row vector's first element goes into all others, the rest is mixed at random."""
    even = torch.full((size,), size**-0.5, dtype=torch.float64)
    first = torch.zeros_like(even)
    first[0] = 1
    mirror = torch.eye(size, dtype=torch.float64)
    if size > 1:  # Householder's reflection takes the first axis to `even`; of one channel they are the same
        normal = first - even
        mirror -= 2 * torch.outer(normal, normal) / normal.dot(normal)
    mixed = torch.eye(size, dtype=torch.float64)
    mixed[1:, 1:] = random_orthogonal(size - 1, generator) if size > 1 else mixed[1:, 1:]
    return mirror @ mixed


def _swapped(matrix: Tensor, channel: Tensor) -> Tensor:
    """E_d G E_d for each d of `channel` [B]: [B, c, c]."""
    order = torch.arange(len(matrix)).repeat(len(channel), 1)
    order.scatter_(1, channel[:, None], 0)
    order[:, 0] = channel
    return matrix[order[:, :, None], order[:, None, :]]
