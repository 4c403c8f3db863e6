"""Are these outputs those of the reference? One rule an op, from the design's sense of equality.

    linear                integers, scales and sums are equal in every bit; with SwiGLU within 4 units in the last place
    quantize, plain       codes, scale and zero equal
    quantize, otherwise   codes differ by 1 at most, where x / s of the reference is near a half, in few places
    head                  ids and logits equal, sums over the vocabulary within their roundings
    rotate                within the rounding of a float32 sum

What "near" and "within" are is derived in bounds.py.
A comparison is written `difference <= tolerance`, so that NaN, with which outputs are poisoned, fails.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bench.gpu.bounds import (
    near_codes,
    rounding_of_floats,
    rounding_of_halves,
    rounding_of_record,
    rounding_of_rotation,
)
from plugins.int4 import unpack_codes
from plugins.integer_matmul import integer_matmul
from plugins.layout import from_layout
from plugins.prepare import prepare
from plugins.record import OUTPUTS

# Of a tensor's codes beside halves that a design allows to differ, and the standard deviations that chance may add.
MAX_SHARE, DEVIATIONS = 1e-3, 5
SWIGLU_ULPS = 4  # exp 2, sum, quotient
ULP = {torch.float32: 2.0**-23, torch.float16: 2.0**-10}
SMALLEST = {torch.float32: 2.0**-126, torch.float16: 2.0**-14}

GRID = ("bits", "symmetric", "a_group", "clip_lo", "clip_hi")


def _first(wrong: Tensor, found: Tensor, expected: Tensor) -> str:
    place = tuple(int(i) for i in wrong.nonzero()[0])
    count = f"{int(wrong.sum())} of {wrong.numel()}"
    return f"{count} wrong, first at {list(place)}: {found[place].item():.9g}, expected {expected[place].item():.9g}"


def _other_kind(found: Tensor, expected: Tensor) -> str | None:
    if found.shape == expected.shape and found.dtype == expected.dtype:
        return None
    return f"{found.dtype} {list(found.shape)}, expected {expected.dtype} {list(expected.shape)}"


def equal(found: Tensor, expected: Tensor) -> str | None:
    """None when equal in every element, else the first that is not."""
    if other := _other_kind(found, expected):
        return other
    wrong = ~(found == expected)
    return _first(wrong, found, expected) if bool(wrong.any()) else None


def close(found: Tensor, expected: Tensor, tolerance: Tensor) -> str | None:
    """None when |found - expected| <= tolerance everywhere."""
    if other := _other_kind(found, expected):
        return other
    wrong = ~((found == expected) | ((found.double() - expected.double()).abs() <= tolerance))
    return _first(wrong, found, expected) if bool(wrong.any()) else None


def _joined(*named: tuple[str, str | None]) -> str | None:
    said = [f"{name}: {text}" for name, text in named if text]
    return "; ".join(said) or None


def _too_many(apart: Tensor, x: Tensor) -> str | None:
    # Equal rows, as those of masks in front of the first block, differ alike and count once.
    rows = x.flatten(0, -2)
    once = {number: row for row, number in enumerate(torch.unique(rows, dim=0, return_inverse=True)[1].tolist())}
    apart = apart.reshape(rows.shape)[sorted(once.values())]
    count = int(apart.sum())
    # Which values fall near a half is chance: a count of rare things deviates by its root, and by 1 where it is small.
    mean = MAX_SHARE * apart.numel()
    allowed = mean + DEVIATIONS * max(mean, 1.0) ** 0.5
    return None if count <= allowed else f"{count} of {apart.numel()} codes differ, at most {allowed:.0f} may"


def compare_quantize(
    found: Sequence[Tensor], expected: Sequence[Tensor], x: Tensor, given: dict[str, Any]
) -> str | None:
    """What is wrong with codes, scale, zero; `given` are the arguments of the call."""
    names = ("codes", "scale", "zero")
    if not any(given.get(name) is not None for name in ("norm_weight", "tac_matrix", "left")):
        return _joined(*((name, equal(a, b)) for name, a, b in zip(names, found, expected, strict=True)))
    others = [(name, _other_kind(a, b)) for name, a, b in zip(names, found, expected, strict=True)]
    if any(other for _, other in others):
        return _joined(*others)
    tensors = {name: value for name, value in given.items() if name not in (*GRID, "path")}
    error = rounding_of_floats(x, tensors)
    # Only the tile path holds operands as halves, and the plan prefers it where it can.
    if tensors.get("left") is not None and given.get("bits", 4) <= 4 and given.get("path", "auto") in ("auto", "tile"):
        error = torch.maximum(error, rounding_of_halves(x, tensors))
    near = near_codes(found, expected, prepare(x, **tensors), error, given)
    bits = given.get("bits", 4)
    shown = {name: (a, b) for name, a, b in zip(names, found, expected, strict=True)}
    shown["codes"] = unpack_codes(found[0], bits), unpack_codes(expected[0], bits)
    said = [(name, _first(mask, *shown[name])) for name, mask in near.wrong.items() if bool(mask.any())]
    return _joined(*said, ("codes", _too_many(near.apart, x)))


def compare_linear(found: Tensor, expected: Tensor, swiglu: bool) -> str | None:
    """What is wrong with y."""
    if not swiglu:
        return equal(found, expected)
    ulps, ulp = SWIGLU_ULPS if expected.dtype == torch.float32 else 1, ULP[expected.dtype]
    return close(found, expected, ulps * ulp * expected.double().abs() + ulp * SMALLEST[expected.dtype])


def compare_head(
    found: Sequence[Tensor], expected: Sequence[Tensor], given: tuple[Any, ...], layout: int
) -> str | None:
    """What is wrong with the five outputs; `given` are the tensors of the call."""
    codes, scale, weight, w_scale, logit_bias, inv_temp = given[:6]
    logits = integer_matmul(codes, from_layout(weight, layout), 8, 8).float() * w_scale.squeeze(-1) * scale + logit_bias
    errors = rounding_of_record(logits, inv_temp, expected[2:])
    sums = [close(a, b, error) for a, b, error in zip(found[2:], expected[2:], errors, strict=True)]
    return _joined(
        *((name, equal(a, b)) for name, a, b in zip(OUTPUTS, found[:2], expected[:2], strict=False)),
        *zip(OUTPUTS[2:], sums, strict=True),
    )


def compare_rotate(found: Tensor, expected: Tensor, x: Tensor, blocks: Tensor, perm: Tensor) -> str | None:
    """What is wrong with y: a sum of `block` products in float32, then the type of y."""
    ulp = ULP[expected.dtype]
    last = ulp * expected.double().abs() + ulp * SMALLEST[expected.dtype]
    return close(found, expected, rounding_of_rotation(x, blocks, perm) + last)


def compare_call(
    op: str, found: list[Tensor], expected: list[Tensor], given: tuple[Any, ...], named: dict[str, Any]
) -> str | None:
    """What is wrong with the outputs of one call, by the rule of its op."""
    if op == "quantize":
        return compare_quantize(found, expected, given[0], named)
    if op == "linear":
        return compare_linear(found[0], expected[0], named.get("swiglu", False))
    if op == "head":
        return compare_head(found, expected, given, named.get("layout", 1))
    return compare_rotate(found[0], expected[0], *given[:3])
