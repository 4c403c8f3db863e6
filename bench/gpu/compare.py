"""Are these outputs those of the reference? One rule an op, from the design's sense of equality.

    linear                integers, scales and sums are equal in every bit; with SwiGLU within 4 units in the last place
    quantize, plain       codes, scale and zero equal
    quantize, otherwise   codes differ by 1 at most, where x / s of the reference is near a half, in few places
    head                  ids and logits equal, sums over the vocabulary within a few units
    rotate                within the rounding of a float32 sum

A comparison is written `difference <= tolerance`, so that NaN, with which outputs are poisoned, fails.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from plugins.affine_grid import split_groups
from plugins.int4 import unpack_int4
from plugins.quantize import prepare

MAX_SHARE = 1e-3
# Kernels may hold the transform's operands as halves: two stages of two roundings of 2^-11 of the row's largest value,
# which is 7 (127) steps, gathered over a row of the factor; 8-bit paths compute in float32.
NEAR_HALF = {4: 7 * 8 * 2.0**-11, 8: 127 * 64 * 2.0**-24}
SCALE_ERROR = {4: 8 * 2.0**-11, 8: 64 * 2.0**-24}
LINEAR_ULPS = 4
SUM_ERROR = 1e-4
ULP = {torch.float32: 2.0**-23, torch.float16: 2.0**-10}
SMALLEST = {torch.float32: 2.0**-126, torch.float16: 2.0**-14}

GRID = ("bits", "symmetric", "a_group", "clip_lo", "clip_hi")


def _first(wrong: Tensor, found: Tensor, expected: Tensor) -> str:
    place = tuple(int(i) for i in wrong.nonzero()[0])
    count = f"{int(wrong.sum())} of {wrong.numel()}"
    return f"{count} wrong, first at {list(place)}: {found[place].item():.9g}, expected {expected[place].item():.9g}"


def equal(found: Tensor, expected: Tensor) -> str | None:
    """None when equal in every element, else the first that is not."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return f"{found.dtype} {list(found.shape)}, expected {expected.dtype} {list(expected.shape)}"
    wrong = ~(found == expected)
    return _first(wrong, found, expected) if bool(wrong.any()) else None


def close(found: Tensor, expected: Tensor, relative: float, absolute: float) -> str | None:
    """None when |found - expected| <= relative |expected| + absolute everywhere."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return f"{found.dtype} {list(found.shape)}, expected {expected.dtype} {list(expected.shape)}"
    difference = (found.double() - expected.double()).abs()
    wrong = ~((found == expected) | (difference <= relative * expected.double().abs() + absolute))
    return _first(wrong, found, expected) if bool(wrong.any()) else None


def _joined(*named: tuple[str, str | None]) -> str | None:
    said = [f"{name}: {text}" for name, text in named if text]
    return "; ".join(said) or None


def _steps(outputs: Sequence[Tensor], bits: int, group: int) -> Tensor:
    """q + z [..., K]: the whole number of steps that a code stands for, in which a zero that is off by one cancels."""
    codes = unpack_int4(outputs[0].view(torch.uint8)) if bits <= 4 else outputs[0]
    groups = split_groups(codes.int(), group)
    return (groups + outputs[2].unsqueeze(-1) if outputs[2].numel() else groups).flatten(-2)


def _near_halves(found: Sequence[Tensor], expected: Sequence[Tensor], x: Tensor, given: dict[str, Any]) -> str | None:
    bits, group = given.get("bits", 4), given.get("a_group", 0)
    ours, theirs = _steps(found, bits, group), _steps(expected, bits, group)
    apart = (ours - theirs).abs()
    if int(apart.max()) > 1:
        return _first(apart > 1, ours, theirs)
    values = prepare(x, **{name: value for name, value in given.items() if name not in (*GRID, "path")})
    exact = (split_groups(values.double(), group) / expected[1].double().unsqueeze(-1)).flatten(-2)
    to_half = ((exact - exact.floor()) - 0.5).abs()
    far = (apart > 0) & ~(to_half <= NEAR_HALF[4 if bits <= 4 else 8])
    if bool(far.any()):
        return "away from a half: " + _first(far, ours, theirs)
    # Equal rows, as those of masks in front of the first block, differ alike and count once.
    rows = x.flatten(0, -2)
    once = {number: row for row, number in enumerate(torch.unique(rows, dim=0, return_inverse=True)[1].tolist())}
    apart = apart.reshape(rows.shape)[sorted(once.values())]
    count = int((apart > 0).sum())
    # Which roundings fall near a half is chance: five standard deviations of a count, which a large tensor hardly has.
    expected_count = MAX_SHARE * apart.numel()
    allowed = expected_count + 5 * expected_count**0.5 + 2
    return None if count <= allowed else f"{count} of {apart.numel()} codes differ, at most {allowed:.0f} may"


def compare_quantize(
    found: Sequence[Tensor], expected: Sequence[Tensor], x: Tensor, given: dict[str, Any]
) -> str | None:
    """What is wrong with codes, scale, zero; `given` are the arguments of the call."""
    plain = not any(given.get(name) is not None for name in ("norm_weight", "tac_matrix", "left"))
    if plain:
        names = ("codes", "scale", "zero")
        return _joined(*((name, equal(a, b)) for name, a, b in zip(names, found, expected, strict=True)))
    error = SCALE_ERROR[4 if given.get("bits", 4) <= 4 else 8]
    scale, zero = close(found[1], expected[1], error, 0.0), close(found[2], expected[2], 0.0, 1.0)
    return _joined(("scale", scale), ("zero", zero), ("codes", _near_halves(found, expected, x, given)))


def compare_linear(found: Tensor, expected: Tensor, swiglu: bool) -> str | None:
    """What is wrong with y."""
    if not swiglu:
        return equal(found, expected)
    dtype = expected.dtype
    ulps = LINEAR_ULPS if dtype == torch.float32 else 1
    return close(found, expected, ulps * ULP[dtype], ULP[dtype] * SMALLEST[dtype])


def compare_head(found: Sequence[Tensor], expected: Sequence[Tensor]) -> str | None:
    """What is wrong with the five outputs."""
    sums = [close(a, b, SUM_ERROR, SUM_ERROR) for a, b in zip(found[2:], expected[2:], strict=True)]
    return _joined(
        ("top_ids", equal(found[0], expected[0])),
        ("top_logits", equal(found[1], expected[1])),
        *zip(("tail", "neg_entropy", "lse_t"), sums, strict=True),
    )


def compare_rotate(found: Tensor, expected: Tensor, x: Tensor, blocks: Tensor) -> str | None:
    """What is wrong with y: a sum of `block` products in float32, then the type of y."""
    size = blocks.shape[-1]
    largest = float(x.double().abs().max()) * float(blocks.double().abs().max())
    return close(found, expected, ULP[expected.dtype], size * size * 2.0**-24 * largest)


def compare_call(
    op: str, found: list[Tensor], expected: list[Tensor], given: tuple[Any, ...], named: dict[str, Any]
) -> str | None:
    """What is wrong with the outputs of one call, by the rule of its op."""
    if op == "quantize":
        return compare_quantize(found, expected, given[0], named)
    if op == "linear":
        return compare_linear(found[0], expected[0], named.get("swiglu", False))
    if op == "head":
        return compare_head(found, expected)
    return compare_rotate(found[0], expected[0], given[0], given[1])
