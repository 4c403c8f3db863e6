"""GPTQ: columns are rounded one after another, and those still to come make up for the error of each.

Source: arXiv 2210.17323, algorithm 1. With H = X^T X + damping and R^T R = H^-1 (R upper triangular), rounding column j
costs e = (w_j - q_j) / R_jj, and every later column k changes by -e R_jk. What lies beyond a block changes at its end.
Shape letters: N rows, K columns, G groups.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from passes.solvers.clip import clip_ratios
from passes.solvers.grid import Grid, Levels

# Shares of the mean diagonal that damp a Hessian which the share asked for leaves singular.
DAMPINGS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


class SingularHessianError(ValueError):
    """The inputs leave no Hessian that can be inverted; they, not the solver, are at fault."""


def gptq(
    weight: Tensor,
    hessian: Tensor,
    *,
    bits: int,
    group: int,
    symmetric: bool,
    damping: float,
    block: int,
    act_order: bool = False,
    clip: bool = False,
) -> Grid:
    """Grid of weight [N, K] for inputs with sum of squares `hessian` [K, K], computed in the Hessian's type.

    A group's scale is that of its columns when the first is reached; with `act_order` (columns by falling diagonal of
    the Hessian) that of the original ones. `clip` searches each scale's ratio. Columns without input become 0.
    Raises SingularHessianError.
    """
    rows, inner = weight.shape
    size = group or inner
    if inner % size:
        raise ValueError(f"a group does not divide the columns; got {size} and {inner}")
    # [K, N], each column in one piece, and never the stored weight itself.
    columns = weight.to(hessian.dtype).T.clone(memory_format=torch.contiguous_format)
    columns[hessian.diagonal() == 0] = 0
    scales = _Scales(Levels(bits, symmetric), (inner // size, rows), clip)
    order = torch.arange(inner)
    if act_order:
        for index in range(inner // size):
            scales.enter(index, columns[index * size : (index + 1) * size])
        order = hessian.diagonal().argsort(descending=True, stable=True)
        columns = columns[order]
    factor, groups = inverse_factor(hessian, order, damping), (order // size).tolist()
    codes = torch.empty(inner, rows, dtype=torch.int8)
    for start, end in _spans(inner, size, block):
        errors = columns.new_empty(end - start, rows)
        for j in range(start, end):
            if not act_order and j % size == 0:
                scales.enter(groups[j], columns[j : j + size])
            code, value = scales.round(groups[j], columns[j])
            codes[order[j]] = code
            errors[j - start] = (columns[j] - value) / factor[j, j]
            columns[j + 1 : end].addr_(factor[j, j + 1 : end], errors[j - start], alpha=-1)
        columns[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    return scales.grid(codes)


class _Scales:
    """Scale and zero of each group, [G, N]."""

    def __init__(self, levels: Levels, shape: tuple[int, int], clip: bool) -> None:
        self.levels, self.clip = levels, clip
        self.scale, self.zero = torch.empty(shape), torch.empty(shape)

    def enter(self, group: int, columns: Tensor) -> None:
        """Fix the scale of a group by what its columns [g, N] are now."""
        part, levels = columns.T, self.levels
        ratio: Tensor | float = 1.0
        if self.clip:
            # In rows: the search sums each many times.
            ratio = clip_ratios(part.contiguous(), bits=levels.bits, group=0, symmetric=levels.symmetric)[:, 0]
        self.scale[group], self.zero[group] = levels.fit(part, ratio)

    def round(self, group: int, column: Tensor) -> tuple[Tensor, Tensor]:
        """Code and value of a column [N]."""
        code = self.levels.round(column, self.scale[group], self.zero[group])
        return code.to(torch.int8), self.levels.value(code, self.scale[group], self.zero[group])

    def grid(self, codes: Tensor) -> Grid:
        """The whole weight on its grid, of codes [K, N]."""
        zero = None if self.levels.symmetric else self.zero.T.to(torch.int8).contiguous()
        return Grid(codes=codes.T.contiguous(), scale=self.scale.T.contiguous(), zero=zero)


def inverse_factor(hessian: Tensor, order: Tensor, damping: float) -> Tensor:
    """Upper triangular R with R^T R = (H + damping mean(diag H) I)^-1, rows and columns of H in `order`.

    A zero on the diagonal counts as 1. The damping rises tenfold until a factor exists; SingularHessianError is raised
    when it would have to pass 1.
    """
    # Backwards, H is L L^T. Forwards again that is U U^T with U upper triangular, so R is the inverse of U: that of L,
    # backwards. One factorisation instead of two and an inverse, and four matrices of this size at most.
    backwards = order.flip(0)
    for share in (damping, *(each for each in DAMPINGS if each > damping)):
        damped = hessian[backwards[:, None], backwards]
        diagonal = damped.diagonal()
        diagonal[diagonal == 0] = 1
        diagonal.add_(share * diagonal.mean())
        lower, info = torch.linalg.cholesky_ex(damped)
        del damped, diagonal
        if int(info):
            continue
        inverse = torch.eye(len(lower), dtype=lower.dtype)
        torch.linalg.solve_triangular(lower, inverse, upper=False, out=inverse)
        del lower
        if bool(inverse.isfinite().all()):
            return inverse.flip(0, 1)
    raise SingularHessianError(f"the Hessian stays singular with a damping of {max(damping, DAMPINGS[-1]):g}")


def _spans(inner: int, size: int, block: int) -> Iterator[tuple[int, int]]:
    """Blocks of columns: within one group, or of whole groups, so that a group is up to date when it is entered."""
    stride = size if size > block else block // size * size
    for outer in range(0, inner, stride):
        stop = min(outer + stride, inner)
        for start in range(outer, stop, block):
            yield start, min(start + block, stop)
