"""Temporal attention compensation: an affine map of each block of channels, from quantised outputs to full precision.

    z[:, b] M_b^T + d_b,   d_b = mu_FP - M_b mu_Q

    covariance   M = U diag((1 - eta) s + eta mean(s)) V^T,  U diag(s) V^T = S_FP^1/2 (S_Q + lambda I)^-1/2
    paired       M = I + E[(e - mu_e)(z_Q - mu_Q)^T] (S_Q + lambda I)^-1,   e = z_FP - z_Q

with lambda = rho max(tr(S_Q) / g, eps), and (1 - alpha) M + alpha I in the end. Covariance is that of arXiv 2606.04945,
appendix C. Paired is a ridge regression whose ridge draws to the identity: where nothing is to be made good it is that.
Shape letters: M rows, K channels, g channels a block, B = K / g blocks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

EPS = 1e-8  # of the mean variance, below which the ridge does not fall
LEAST = 1e-12  # eigenvalue of a covariance before its root or inverse
ALPHAS = (1.0, 0.75, 0.5, 0.25, 0.0)  # the most cautious first, which wins a tie


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Of paired rows, float64: means [B, g], covariances about them [B, g, g], divided by `count`.

    The error is full precision less quantised; `cross` has the error's channels in rows, the quantised ones in columns.
    """

    count: int
    mean: Tensor
    error_mean: Tensor
    covariance: Tensor
    error_covariance: Tensor
    cross: Tensor

    @property
    def full_mean(self) -> Tensor:
        """Mean [B, g] in full precision."""
        return self.mean + self.error_mean

    @property
    def full_covariance(self) -> Tensor:
        """Covariance [B, g, g] in full precision."""
        return self.covariance + self.cross + self.cross.mT + self.error_covariance


@dataclass(frozen=True, kw_only=True)
class Affine:
    """z -> z[:, b] matrix_b^T + bias_b; matrix [B, g, g], bias [B, g]."""

    matrix: Tensor
    bias: Tensor


def block_size(width: int, limit: int) -> int:
    """The largest divisor of `width` that is not above `limit`."""
    return next(size for size in range(min(width, limit), 0, -1) if width % size == 0)


def identity(width: int, block: int) -> Affine:
    """What changes nothing, in float32."""
    blocks = width // block
    return Affine(matrix=torch.eye(block).repeat(blocks, 1, 1), bias=torch.zeros(blocks, block))


def moments(full: Tensor, quantized: Tensor, block: int) -> Moments:
    """Of paired rows [M, K]; M is at least 1."""
    rows = torch.unflatten(quantized.double(), -1, (-1, block)).transpose(0, 1)
    errors = torch.unflatten(full.double() - quantized.double(), -1, (-1, block)).transpose(0, 1)
    count, mean, error_mean = len(quantized), rows.mean(1), errors.mean(1)
    rows, errors = rows - mean[:, None], errors - error_mean[:, None]
    return Moments(
        count=count,
        mean=mean,
        error_mean=error_mean,
        covariance=rows.mT @ rows / count,
        error_covariance=errors.mT @ errors / count,
        cross=errors.mT @ rows / count,
    )


def merged(one: Moments, other: Moments) -> Moments:
    """Of the rows of both. Sums depend on the order in their last bits."""
    count = one.count + other.count
    here, there = one.count / count, other.count / count
    apart, error_apart = other.mean - one.mean, other.error_mean - one.error_mean

    def joined(own: Tensor, others: Tensor, left: Tensor, right: Tensor) -> Tensor:
        return here * own + there * others + here * there * _outer(left, right)

    return Moments(
        count=count,
        mean=one.mean + there * apart,
        error_mean=one.error_mean + there * error_apart,
        covariance=joined(one.covariance, other.covariance, apart, apart),
        error_covariance=joined(one.error_covariance, other.error_covariance, error_apart, error_apart),
        cross=joined(one.cross, other.cross, error_apart, apart),
    )


def covariance(found: Moments, *, rho: float, eta: float, alpha: float) -> Affine:
    """The map after which covariances agree, smoothed by `eta` and drawn to the identity by `alpha`."""
    matrix = _power(found.full_covariance, 0.5) @ _power(_ridged(found, rho), -0.5)
    u, values, vh = torch.linalg.svd(matrix)
    values = (1 - eta) * values + eta * values.mean(-1, keepdim=True)
    return _shrunk(u * values[:, None] @ vh, found, alpha)


def paired(found: Moments, *, rho: float, alpha: float) -> Affine:
    """The map with the least squared error on the rows, but for its ridge, drawn to the identity by `alpha`."""
    matrix = _one(found) + found.cross @ _power(_ridged(found, rho), -1.0)
    return _shrunk(matrix, found, alpha)


def chosen(found: Moments, held_out: Moments, *, rho: float) -> Affine:
    """`paired` with that of `ALPHAS` which leaves the least error on rows held out."""
    return min((paired(found, rho=rho, alpha=alpha) for alpha in ALPHAS), key=lambda each: error(each, held_out))


def error(affine: Affine, found: Moments) -> float:
    """Squared distance of z_FP to the compensated z_Q, summed over channels, its mean over the rows."""
    # Of M - I and the error: where these are small, differences of moments of z would be noise.
    change = affine.matrix.double() - _one(found)
    mean = found.error_mean - _applied(change, found.mean) - affine.bias.double()
    spread = found.error_covariance + change @ found.covariance @ change.mT - 2 * change @ found.cross.mT
    return float(spread.diagonal(dim1=-2, dim2=-1).sum() + mean.square().sum())


def _one(found: Moments) -> Tensor:
    return torch.eye(found.mean.shape[-1], dtype=torch.float64)


def _ridged(found: Moments, rho: float) -> Tensor:
    variance = found.covariance.diagonal(dim1=-2, dim2=-1).mean(-1)
    return found.covariance + rho * variance.clamp(min=EPS)[:, None, None] * _one(found)


def _power(matrix: Tensor, exponent: float) -> Tensor:
    """Of symmetric matrices [B, g, g] with no eigenvalue below `LEAST`."""
    values, vectors = torch.linalg.eigh(matrix)
    power: Tensor = vectors * values.clamp(min=LEAST).pow(exponent)[:, None] @ vectors.mT
    return power


def _shrunk(matrix: Tensor, found: Moments, alpha: float) -> Affine:
    matrix = (1 - alpha) * matrix + alpha * _one(found)
    return Affine(matrix=matrix, bias=found.full_mean - _applied(matrix, found.mean))


def _applied(matrix: Tensor, vectors: Tensor) -> Tensor:
    return (matrix @ vectors[..., None])[..., 0]


def _outer(left: Tensor, right: Tensor) -> Tensor:
    return left[..., :, None] * right[..., None, :]
