"""The LM head: ids and logits equal to the torch reference, sums over the vocabulary within derived bounds.

Shape letters: B batch, R head rows, V vocabulary, K inner.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.gpu.bounds import rounding_of_record
from plugins.cuda_library import CudaLibrary, check_reason
from plugins.head import head
from plugins.integer_matmul import integer_matmul
from plugins.layout import to_layout

Kernels = Callable[..., CudaLibrary]
F = torch.float32


@dataclass(frozen=True)
class Case:
    """Sizes, the spread of the logits, and a bias that is added to all rows."""

    batch: int
    rows: int
    vocabulary: int = 112
    inner: int = 64
    top_k: int = 5
    spread: float = 4.0
    inv_temp: float | None = None
    bias: Tensor | None = None


def draw(case: Case) -> dict[str, Any]:
    """Tensors of `head`, weights canonical."""
    random = torch.Generator().manual_seed(case.batch * 1000 + case.rows + case.vocabulary)
    B, R, V, K = case.batch, case.rows, case.vocabulary, case.inner
    one_logit = case.spread / (K**0.5 * 73**2)  # 73 is the deviation of the codes
    return {
        "codes": torch.randint(-127, 128, (B, R, K), generator=random, dtype=torch.int8),
        "scale": torch.rand((B, R, 1), generator=random) + 0.5,
        "weight": torch.randint(-127, 128, (V, K), generator=random, dtype=torch.int8),
        "w_scale": (torch.rand((V, 1), generator=random) + 0.5) * one_logit,
        "logit_bias": torch.zeros(V) if case.bias is None else case.bias,
        "inv_temp": torch.rand(B, generator=random) + 0.5 if case.inv_temp is None else torch.full((B,), case.inv_temp),
    }


def run(library: CudaLibrary, case: Case, inputs: dict[str, Any], path: str, layout: int) -> tuple[Tensor, ...]:
    weight = to_layout(inputs["weight"], layout)
    return library.head(**{**inputs, "weight": weight}, top_k=case.top_k, layout=layout, path=path)


def bounds(inputs: dict[str, Any], sums: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """How far tail, neg_entropy and lse_t may be from the reference's `sums`."""
    logits = integer_matmul(inputs["codes"], inputs["weight"], 8, 8).float() * inputs["w_scale"].squeeze(-1)
    return rounding_of_record(logits * inputs["scale"] + inputs["logit_bias"], inputs["inv_temp"], sums)


def check(library: CudaLibrary, case: Case, path: str = "auto", layout: int = 1) -> None:
    inputs = draw(case)
    expected = head(**inputs, top_k=case.top_k)
    found = run(library, case, inputs, path, layout)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    for name, x, y, bound in zip(
        ("tail", "neg_entropy", "lse_t"), found[2:], expected[2:], bounds(inputs, expected[2:]), strict=True
    ):
        error = (x.double() - y.double()).abs()
        assert (error <= bound).all(), f"{name} is off by {float((error / bound).max()):.3g} of its bound"


SHAPES = [(1, 1), (1, 7), (2, 4), (3, 3), (1, 16), (1, 17), (2, 16), (3, 11), (1, 64), (1, 65), (2, 70)]


@pytest.mark.parametrize(("batch", "rows"), SHAPES)
@pytest.mark.parametrize("num_sms", [1, 3])
def test_equals_reference(batch: int, rows: int, num_sms: int, kernels: Kernels) -> None:
    """Every tile of rows, full and not, more rows than a tile; slabs of one and of several units, an odd last tile."""
    check(kernels(90, num_sms), Case(batch, rows))
    check(kernels(90, num_sms), Case(batch, rows, vocabulary=16, top_k=1))


@pytest.mark.parametrize("layout", [0, 1])
@pytest.mark.parametrize(("batch", "rows"), [(1, 1), (2, 17)])
def test_naive(batch: int, rows: int, layout: int, kernels: Kernels) -> None:
    """The textbook kernel in both layouts; without fragment order it is what runs."""
    check(kernels(), Case(batch, rows, inner=192), "naive", layout)
    check(kernels(), Case(batch, rows, top_k=64), "auto", layout)


@pytest.mark.parametrize("top_k", [1, 2, 31, 32, 33, 63, 64])
def test_top_k(top_k: int, kernels: Kernels) -> None:
    """Lists shorter and longer than a warp, slabs with fewer ids than the list."""
    check(kernels(87, num_sms=2), Case(1, 5, vocabulary=176, top_k=top_k))
    check(kernels(87, num_sms=2), Case(1, 37, vocabulary=80, top_k=top_k))
    rising = torch.linspace(0, 300, 176)  # the last slab has most of the best ids, and each goes to the front
    check(kernels(87, num_sms=1), Case(1, 5, vocabulary=176, top_k=top_k, bias=rising))


@pytest.mark.parametrize("rows", [3, 24, 40])
def test_ties(rows: int, kernels: Kernels) -> None:
    """All logits equal, and equal pairs: the lower id comes first."""
    check(kernels(num_sms=2), Case(1, rows, spread=0.0, top_k=40))
    levels = torch.arange(112, dtype=F) // 2 % 9
    check(kernels(num_sms=2), Case(1, rows, spread=0.0, top_k=40, bias=levels))


@pytest.mark.parametrize("allowed", [[0], [111], [40, 41], [3, 50, 100], list(range(16, 112))])
@pytest.mark.parametrize("rows", [2, 20, 37])
def test_banned(allowed: list[int], rows: int, kernels: Kernels) -> None:
    """Banned ids weigh nothing and stand last, lower ids first; whole slabs may be banned."""
    bias = torch.full((112,), -torch.inf)
    bias[allowed] = 0.0
    check(kernels(num_sms=2), Case(1, rows, bias=bias, top_k=8))


@pytest.mark.parametrize("inv_temp", [0.01, 1.0, 3.0, 100.0])
@pytest.mark.parametrize(
    "bias",
    [
        torch.linspace(-60, 60, 112),
        torch.linspace(60, -60, 112),
        torch.linspace(-3000, 9, 112),
        torch.full((112,), -500.0),
        torch.linspace(0, 1e-3, 112),
        torch.arange(112, dtype=F) % 16 * 20,
    ],
)
def test_any_order(inv_temp: float, bias: Tensor, kernels: Kernels) -> None:
    """Rising, falling, far from 0, nearly equal: sums keep their bound; temperatures hot and cold."""
    for spread in (0.0, 2.0):
        check(kernels(num_sms=1), Case(1, 9, bias=bias, spread=spread, inv_temp=inv_temp))


def test_tail_far_below_one(kernels: Kernels) -> None:
    """A tail of e^-60 is not lost beside the peak's 1."""
    bias = torch.zeros(112)
    bias[77] = 64.0
    case = Case(1, 2, bias=bias, spread=0.0)
    check(kernels(), case)
    tail = run(kernels(), case, draw(case), "small", 1)[2]
    assert (tail > 0).all() and (tail < 1e-24).all()


def test_long_inner(kernels: Kernels) -> None:
    """The longest K of all largest codes stays below 2^31."""
    case = Case(1, 1, vocabulary=16, inner=1 << 17, top_k=1)
    inputs = draw(case)
    for name in ("codes", "weight"):
        inputs[name] = torch.full_like(inputs[name], 127)
    expected = head(**inputs, top_k=1)
    assert torch.equal(run(kernels(), case, inputs, "small", 1)[1], expected[1])


GOOD: dict[str, Any] = {"rows": 4, "rows_per_batch": 2, "inner": 64, "vocabulary": 32, "top_k": 3, "layout": 1}


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("rows", -1, "rows: got -1, expected 0..1048576"),
        ("rows_per_batch", 3, "rows_per_batch: got 3, expected a divisor of 4 rows"),
        ("rows_per_batch", 0, "rows_per_batch: got 0, expected a divisor of 4 rows"),
        ("inner", 96, "inner: got 96, expected a multiple of 64 in 64..131072"),
        ("vocabulary", 24, "vocabulary: got 24, expected a multiple of 16 in 16..16777216"),
        ("top_k", 0, "top_k: got 0, expected 1..32"),
        ("top_k", 33, "top_k: got 33, expected 1..32"),
        ("layout", 2, "layout: got 2, expected 0 or 1"),
    ],
)
def test_refused(field: str, value: int, expected: str, kernels: Kernels) -> None:
    assert check_reason(kernels(), "head", **GOOD) is None
    assert check_reason(kernels(), "head", **{**GOOD, field: value}) == expected


def test_refused_when_run(kernels: Kernels) -> None:
    """Paths and layouts that do not go together, a GPU too old."""
    case = Case(1, 1)
    with pytest.raises(ValueError, match="layout: got 0, expected 1 on the small path"):
        run(kernels(), case, draw(case), "small", 0)
    with pytest.raises(ValueError, match="path: got large, expected auto, naive or small"):
        run(kernels(), case, draw(case), "large", 1)
    with pytest.raises(ValueError, match="num_sms: got 0, expected at least 1"):
        run(kernels(num_sms=0), case, draw(case), "auto", 1)
    old = kernels()
    old.device.arch = 75
    with pytest.raises(ValueError, match="arch: got 75, expected 80 or newer"):
        run(old, case, draw(case), "auto", 1)


def test_no_rows(kernels: Kernels) -> None:
    """Nothing to do is not an error."""
    assert run(kernels(), replace(Case(1, 0)), draw(Case(1, 0)), "auto", 1)[0].shape == (1, 0, 5)
