"""How far a kernel's sums may stand from the references' sums in float64: derived, for kernels' tests and GPUs alike.

U is what one rounding costs, as a share of what is rounded: 2^-24 in float32, 2^-11 in halves.
Shape letters: M rows, K inner, G groups, a x b = K the Kronecker factors, B batch, R head rows, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from plugins.affine_grid import split_groups
from plugins.int4 import code_limit, unpack_codes
from plugins.prepare import prepare
from plugins.rotate import rotate

U, HALF_U = 2.0**-24, 2.0**-11
SMALLEST = 2.0**-149  # of float32, above 0
HEADROOM = 8  # of head_tiles.cu
NORM_ROUNDINGS = 32  # half of those of a sum of squares (32 in a thread, 10 more); mean, eps, root, 1 / root, products


@dataclass(frozen=True)
class Near:
    """What `near_codes` found: where each output is wrong, and where codes differ, wrong or not."""

    wrong: dict[str, Tensor]
    apart: Tensor


def _is_near_half(x: Tensor, tolerance: Tensor) -> Tensor:
    return (x - x.floor() - 0.5).abs() <= tolerance


def near_codes(
    found: Sequence[Tensor], expected: Sequence[Tensor], y: Tensor, error: Tensor, options: Mapping[str, Any]
) -> Near:
    """Codes, scale and zero `found` of values that differ from y [..., K], the reference's, by at most `error`.

    Scale: it moves by the largest error of its group over the limit of the codes, and by 3 roundings of its own.
    Steps x / s: off by the error, by the scale's, and by 3 roundings of a number that is clipped above 2 limit + 1.
    Codes may differ by 1, and only where the reference's x / s is that near to a half.
    So may a zero point, (high + low) / 2 s rounded: then its group moves with it, but for codes that are clipped.
    """
    bits, limit, a_group = options.get("bits", 4), code_limit(options.get("bits", 4)), options.get("a_group", 0)
    scale, zero = expected[1], expected[2]
    wide = scale.double().unsqueeze(-1)
    values, errors = split_groups(y.double(), a_group), split_groups(error.double(), a_group)
    worst = errors.amax(-1, keepdim=True) / wide
    moved = worst / limit + 6 * U
    wrong = {"scale": ~((found[1] - scale).abs().double() <= scale.double() * moved.squeeze(-1))}
    steps = (values / wide).clamp(-2 * limit - 1, 2 * limit + 1)
    near_half = _is_near_half(steps, errors / wide + steps.abs() * moved + (2 * limit + 1) * 6 * U)
    ours, theirs = (split_groups(unpack_codes(outputs[0], bits).int(), a_group) for outputs in (found, expected))
    shift = torch.zeros_like(wide, dtype=torch.int32)
    if zero.numel():
        high = values.amax(-1, keepdim=True).clamp(min=0) * options.get("clip_hi", 1.0)
        low = values.amin(-1, keepdim=True).clamp(max=0) * options.get("clip_lo", 1.0)
        shift = (found[2] - zero).unsqueeze(-1)
        may_move = _is_near_half((high + low) / (2 * wide), worst + limit * moved + 16 * U)
        wrong["zero"] = ~(shift.abs() <= may_move).squeeze(-1)
    clipped = (shift != 0) & ((ours.abs() == limit) | (theirs.abs() == limit))
    difference = (ours + shift - theirs).abs()
    wrong["codes"] = ~(difference <= (near_half | clipped)).flatten(-2)
    return Near(wrong, (difference > 0).flatten(-2))


def _by_blocks(matrix: Tensor, x: Tensor) -> Tensor:
    """TAC's product: matrix [K/g, g, g] on x [..., K]."""
    blocks = torch.unflatten(x, -1, (-1, matrix.shape[-1])).unsqueeze(-1)
    y: Tensor = (matrix @ blocks).squeeze(-1).flatten(-2)
    return y


def _stages(x: Tensor, given: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """The reference's values [..., K], float64: behind norm and channel scale; behind TAC as well."""
    names = ("norm_weight", "channel_scale", "eps")
    first = {name: given[name] for name in names if name in given}
    tac = {name: given[name] for name in ("tac_matrix", "tac_bias") if name in given}
    return prepare(x, **first).double(), prepare(x, **first, **tac).double()


def _largest(row: Tensor, given: Mapping[str, Any]) -> Tensor:
    """Sums of magnitudes behind TAC of values `row` behind the norm."""
    if given.get("tac_matrix") is None:
        return row.abs()
    matrix, bias = (tensor.double().abs() for tensor in (given["tac_matrix"], given["tac_bias"]))
    largest: Tensor = _by_blocks(matrix, row.abs()) + bias
    return largest


def rounding_of_halves(x: Tensor, given: Mapping[str, Any]) -> Tensor:
    """Error of the tile path's values [..., K] of a quantiser's arguments, in all but 5e-11 of the places.

    Halves round the row x (exact if it is float16 and nothing multiplies it), right R, the tile Y = X R between the
    stages, left L; with TAC its result. An error e enters z = L^T X R by a known factor: x by L R, R by L^T X, Y by L,
    L by Y. The errors are taken as independent with mean 0, so by Hoeffding z is off by more than
    t = 7 sqrt(sum (factor HALF_U |number|)^2) with probability 2 exp(-49 / 2) = 5e-11. Sums in float32 add 2^-19 of the
    sum of magnitudes (at most 26 additions of 16 products, each to 2^-23).
    """
    row, before = _stages(x, given)
    is_exact = x.dtype == torch.float16 and given.get("norm_weight") is None
    variance, largest = torch.zeros_like(row) if is_exact else row.square(), _largest(row, given)
    if given.get("tac_matrix") is not None:
        variance = _by_blocks(given["tac_matrix"].double().square(), variance) + before.square()
    left, right = given["left"].double(), given["right"].double()
    tile, variance, largest = (torch.unflatten(t, -1, (len(left), len(right))) for t in (before, variance, largest))
    by_row = left.square().T @ variance @ right.square()
    by_right = (left.T @ tile).square() @ right.square()
    by_tile_and_left = 2 * left.square().T @ (tile @ right).square()
    magnitude = left.abs().T @ largest @ right.abs()
    error: Tensor = 7 * HALF_U * (by_row + by_right + by_tile_and_left).sqrt() + 2.0**-19 * magnitude
    return error.flatten(-2)


def rounding_of_floats(x: Tensor, given: Mapping[str, Any]) -> Tensor:
    """The same where all is float32: a norm's roundings, and each of a sum by U of its sum of magnitudes."""
    row, _ = _stages(x, given)
    magnitude, terms = _largest(row, given), NORM_ROUNDINGS
    if given.get("tac_matrix") is not None:
        terms += given["tac_matrix"].shape[-1] + 1
    if given.get("left") is not None:
        left, right = given["left"].double().abs(), given["right"].double().abs()
        terms += len(left) + len(right)
        magnitude = (left.T @ torch.unflatten(magnitude, -1, (len(left), len(right))) @ right).flatten(-2)
    return magnitude * terms * U


def rounding_of_rotation(x: Tensor, blocks: Tensor, perm: Tensor) -> Tensor:
    """Error of y [..., K] in float32: each of the additions of a sum rounds by U of its sum of magnitudes."""
    return blocks.shape[-1] * U * rotate(x.float().abs(), blocks.abs(), perm).double()


def rounding_of_record(logits: Tensor, inv_temp: Tensor, sums: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Errors of tail, neg_entropy and lse_t [B, R], the reference's `sums`; logits [B, R, V] with their bias.

    Weights are w = e^z of all but the peak. The kernel rounds l - base, at most HEADROOM above and |z| below 0, where
    the reference rounds z: relative errors HEADROOM + 2 |z| of a weight; exp adds 4, sums of a unit 4 (across units
    they are float64, so V does not count). In w z they count |z| times; rounding z itself adds HEADROOM + 2 |z|,
    product and sums 5 (HEADROOM + |z|). With inv_temp t the reference rounds nothing, the kernel l - base and its
    product with t.
    """
    wide = logits.double()
    peak, ids = wide.max(-1, keepdim=True)
    z = (wide - peak).clamp(min=-1e4)  # e^-1e4 is 0, and 0 * -1e4 is 0 where 0 * -inf is not a number
    depth, weight = z.abs(), z.exp().scatter(-1, ids, 0.0)
    lost = HEADROOM + 2 * depth
    tail_error = (weight * (lost + 8)).sum(-1) * U
    energy_error = (weight * (depth * (lost + 8) + lost + 5 * (HEADROOM + depth))).sum(-1) * U
    warm = z * inv_temp.double()[:, None, None]
    warm_weight = warm.exp().scatter(-1, ids, 0.0)
    warm_error = (warm_weight * (2 * (HEADROOM + warm.abs()) + 8)).sum(-1) * U
    total, energy = 1 + weight.sum(-1), (weight * depth).sum(-1)
    entropy_error = energy_error / total + tail_error * (energy / total + 1) / total
    errors = (tail_error, entropy_error, warm_error / (1 + warm_weight.sum(-1)))
    tail, entropy, lse = (e + U * s.double().abs() + SMALLEST for e, s in zip(errors, sums, strict=True))
    return tail, entropy, lse
