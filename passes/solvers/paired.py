"""The weight that gives wanted outputs on the inputs that are really there, before it is rounded.

    W' = W + R^T X (X^T X + lambda I)^-1,    R = Y - X W^T        the least |Y - X W'^T|^2 + lambda |W' - W|^2

X are the quantised inputs, Y what the linear should give for the float result to come out: what was lost before it is
made up for as far as a linear can. Shape letters: M rows, N outputs, K inner.
"""

import torch
from torch import Tensor

from passes.solvers.grid import row_chunks


def paired_weight(weight: Tensor, moments: Tensor, outputs: Tensor, ridge: float) -> Tensor:
    """W' [N, K] in the type of `weight` [N, K], of float64 X^T X [K, K] and Y^T X [N, K].

    lambda is `ridge` times the mean diagonal of X^T X. Raises torch.linalg.LinAlgError where that leaves it singular.
    """
    # Damped in place for a moment: at the width of a down projection each further copy is 1 to 3 GB.
    diagonal = moments.diagonal()
    own = diagonal.clone()
    diagonal.add_(ridge * own.mean())
    try:
        lower = torch.linalg.cholesky(moments)
    finally:
        diagonal.copy_(own)
    made = torch.empty_like(weight)
    for chunk in row_chunks(weight):
        part = weight[chunk].double()
        missing = outputs[chunk] - part @ moments
        made[chunk] = (part + torch.cholesky_solve(missing.mT, lower).mT).to(weight.dtype)
    return made
