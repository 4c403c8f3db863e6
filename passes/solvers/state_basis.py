"""A basis [shared, masked, unmasked] of one axis of a tile, from what rows of each mask state have along that axis.

    x as a tile X [a, b], gated along a:    A_s = sum of X X^T over the rows x of state s

Rows of a state lose what they have in the coordinates of the other (arXiv 2606.04945, section 3.2, where the basis
starts at random): u^T A_s u in a direction u. So each state gets directions in which the other has least.
Shape letters: K inner, M rows, a x b = K the tile, n the length of the gated axis.
"""

import torch
from torch import Tensor

from passes.solvers.hadamard import rotation


def moments_along(rows: Tensor, factors: tuple[int, int], axis: int) -> Tensor:
    """Second moments float64 [n, n] of rows [M, K] along `axis` of their tiles, summed over rows and the other axis."""
    lines = torch.unflatten(rows.double(), -1, factors).movedim(axis + 1, -1).flatten(0, 1)
    return lines.T @ lines


def state_basis(masked: Tensor, unmasked: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Orthogonal float64 [n, n] of moments [n, n]: n - 2 `size` shared columns, `size` for masked, then for unmasked.

    Shared ones are mixed by a randomised Hadamard matrix, so that all of them hold as much of both states together.
    """
    for_masked, rest = _least(unmasked, torch.eye(len(masked), dtype=torch.float64), size)
    for_unmasked, rest = _least(masked, rest, size)
    # The states are of equal weight, however many rows each has.
    pooled = _scaled(masked) + _scaled(unmasked)
    principal = rest @ torch.linalg.eigh(rest.T @ pooled @ rest).eigenvectors
    return torch.cat([principal @ rotation(principal.shape[1], generator), for_masked, for_unmasked], dim=1)


def _least(moments: Tensor, space: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Orthonormal columns: the `size` directions of `space` that hold least of `moments`, and those that are left."""
    directions = space @ torch.linalg.eigh(space.T @ moments @ space).eigenvectors
    return directions[:, :size], directions[:, size:]


def _scaled(moments: Tensor) -> Tensor:
    return moments / moments.trace().clamp(min=torch.finfo(moments.dtype).tiny)
