"""Kronecker transform and TAC: halves on tensor cores, float32 on CUDA cores, and the naive twin.

How far each may be from the reference is derived in bench/gpu/bounds.py; what a GPU is judged by is proven here.
"""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.gpu.bounds import rounding_of_floats, rounding_of_halves
from plugins.int4 import unpack_codes
from plugins.prepare import prepare
from tests.plugins.cuda.quantize_cases import assert_near, assert_rare, hard_rows


@dataclass
class Case:
    """Inputs of a transform; `options` are quantize's."""

    x: Tensor
    tensors: dict[str, Tensor] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    def reference(self) -> Tensor:
        gate = {key: value for key, value in self.options.items() if key.startswith("gate")}
        return prepare(self.x, **self.tensors, **gate)

    def grid(self) -> dict[str, Any]:
        return {key: value for key, value in self.options.items() if not key.startswith("gate")}


def random_of(*key: int) -> torch.Generator:
    return torch.Generator().manual_seed(sum(number * 1009**i for i, number in enumerate(key)) % 2**31)


def orthogonal(size: int, random: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=random))[0].float().contiguous()


def make_case(a: int, b: int, x: Tensor, norm: bool = False, tac: bool = False, **options: Any) -> Case:
    """Orthogonal factors; TAC near the identity; states at random where `gate_size` is given."""
    random, inner = random_of(a, b, len(x)), a * b
    tensors = {"left": orthogonal(a, random), "right": orthogonal(b, random)}
    if norm:
        tensors["norm_weight"] = torch.rand(inner, generator=random) + 0.5
        tensors["channel_scale"] = torch.rand(inner, generator=random) + 0.5
    if tac:
        tensors["tac_matrix"] = torch.eye(16) + torch.randn(inner // 16, 16, 16, generator=random) * 0.1
        tensors["tac_bias"] = torch.randn(inner, generator=random) * 0.1
    if options.get("gate_size"):
        tensors["state"] = torch.randint(0, 2, (len(x),), dtype=torch.int32, generator=random)
    return Case(x, tensors, options)


def check(library: Any, *cases: Case, path: str = "tile") -> None:
    """All bounds hold, and among all cases' codes few differ."""
    apart = []
    for case in cases:
        found = library.quantize(case.x, **case.tensors, **case.options, path=path)
        error = (rounding_of_halves if path == "tile" else rounding_of_floats)(case.x, case.tensors)
        apart.append(assert_near(found, case.reference(), error, case.grid()))
    assert_rare(*apart)


SIZES = [(8, 16), (12, 16), (16, 24), (4, 32)]
OPTIONS = [
    {},
    {"norm": True, "symmetric": False},
    {"gate_size": 1, "gate_axis": 0, "bits": 3},
    {"gate_size": 2, "gate_axis": 1, "symmetric": False, "clip_lo": 0.8, "clip_hi": 0.9},
    {"tac": True, "norm": True, "gate_size": 2, "gate_axis": 0},
    {"tac": True, "bits": 2, "clip_hi": 0.7},
]


@pytest.mark.parametrize("path", ["tile", "exact", "naive"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("a", "b"), SIZES)
def test_small_tiles(a: int, b: int, options: dict[str, Any], path: str, kernels: Any) -> None:
    draws = [torch.randn(rows, a * b, generator=random_of(rows)) * 3 for rows in (1, 7, 33, 97)]
    cases = [make_case(a, b, x.to(dtype), **options) for x in draws for dtype in (torch.float32, torch.float16)]
    check(kernels(), *cases, path=path)


@pytest.mark.parametrize("path", ["tile", "exact"])
@pytest.mark.parametrize("options", [{}, {"symmetric": False}, {"norm": True, "tac": True}], ids=str)
def test_odd_rows(options: dict[str, Any], path: str, kernels: Any) -> None:
    """Outliers, zeros, one sign, ties, tiny and huge rows (whose squares a norm's float32 must hold)."""
    x = hard_rows(512, seed=3)
    huge = x[:2] * (1e15 if options.get("norm") else 1e30)
    check(kernels(), make_case(16, 32, torch.cat([x, huge, x[:2] * 1e-30]), **options), path=path)


def test_a_row_of_zeros_has_zero_codes(kernels: Any) -> None:
    case = make_case(8, 16, torch.zeros(3, 128), gate_size=1)
    codes, scale, _ = kernels().quantize(case.x, **case.tensors, **case.options, path="tile")
    assert not codes.any() and (scale == 1).all()


@pytest.mark.parametrize("path", ["tile", "exact", "naive"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("a", "b", "a_group"), [(8, 16, 128), (16, 48, 384), (32, 32, 256), (32, 64, 128)])
def test_groups(a: int, b: int, a_group: int, symmetric: bool, path: str, kernels: Any) -> None:
    x = torch.randn(65, a * b, generator=random_of(a_group))
    check(kernels(), make_case(a, b, x, a_group=a_group, symmetric=symmetric, gate_size=1), path=path)


@pytest.mark.parametrize(
    ("grown", "bias", "right"), [(1e4, 1.0, 1.0), (1e-4, 0.0, 1.0), (1.0, 1e6, 300.0), (1.0, 0.0, 1e-3)]
)
def test_tac_and_factors_of_any_size(grown: float, bias: float, right: float, kernels: Any) -> None:
    """Halves neither overflow nor vanish. Rows that a bias outweighs have the same codes: each case has few."""
    cases = [make_case(16, 32, torch.randn(rows, 512, generator=random_of(rows)), tac=True) for rows in range(1, 17)]
    for case in cases:
        case.tensors["tac_matrix"] *= grown
        case.tensors["tac_bias"] *= bias
        case.tensors["right"] *= right
    check(kernels(), *cases)


def test_tac_matrix_counts_as_more_than_halves(kernels: Any) -> None:
    """Its terms cancel to a thousandth, and nothing else is rounded: x is float16 and the factors are the identity."""
    random = random_of(9)
    case = make_case(8, 16, torch.ones(4, 128).half() + torch.arange(4).half()[:, None], tac=True)
    matrix = torch.rand(8, 16, 8, generator=random)
    matrix = torch.stack([matrix, 0.001 * torch.rand(8, 16, 8, generator=random) - matrix], dim=-1).flatten(-2)
    zero = torch.zeros(128)
    case.tensors |= {"left": torch.eye(8), "right": torch.eye(16), "tac_matrix": matrix, "tac_bias": zero}
    check(kernels(), case)


@pytest.mark.parametrize("num_sms", [1, 3, 5, 40])
@pytest.mark.parametrize("tac", [True, False])
def test_blocks_of_any_number_of_tokens(num_sms: int, tac: bool, kernels: Any) -> None:
    """37 rows as 1 to 8 tokens a block, blocks that walk through several, and a last one that is not full."""
    x = torch.randn(37, 512, generator=random_of(num_sms))
    wide = torch.randn(37, 1024, generator=random_of(num_sms))
    check(kernels(num_sms=num_sms), make_case(16, 32, x, tac=tac), make_case(32, 32, wide, tac=tac))


REAL = [(64, 64), (56, 64), (96, 128), (128, 148)]


@pytest.mark.parametrize("arch", [86, 87, 90])
@pytest.mark.parametrize(("a", "b"), REAL)
def test_rows_of_real_models(a: int, b: int, arch: int, kernels: Any) -> None:
    """One and two strips a warp; on 86 the factors of 128 x 148 take turns."""
    axis, size = (0, a * b // 32 // b) if b == 64 else (1, a * b // 32 // a)
    for num_sms in (4, 1):
        x = torch.randn(9, a * b, generator=random_of(a, num_sms)).half()
        check(kernels(arch, num_sms), make_case(a, b, x, gate_axis=axis, gate_size=size))


@pytest.mark.parametrize(("a", "b"), REAL)
def test_8_bits_of_real_models(a: int, b: int, kernels: Any) -> None:
    x = torch.randn(2, a * b, generator=random_of(a))
    check(kernels(), make_case(a, b, x, norm=True, bits=8), path="auto")


def sylvester(size: int) -> Tensor:
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.kron(matrix, torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
    return matrix / size**0.5


def outlier_rows(rows: int, inner: int, share: float, size: float) -> Tensor:
    """Channels with outliers in every row, as they come out of a transformer."""
    random = random_of(inner, rows, int(size))
    x = torch.randn(rows, inner, generator=random)
    return torch.where(torch.rand(inner, generator=random) < share, x * size, x)


@pytest.mark.parametrize("factors", ["orthogonal", "hadamard"])
@pytest.mark.parametrize(("share", "size"), [(0.0, 1.0), (0.01, 30.0), (0.001, 300.0)])
@pytest.mark.parametrize("options", [{"norm": True}, {"tac": True}], ids=str)
def test_at_most_one_code_in_a_thousand_differs(
    options: dict[str, Any], share: float, size: float, factors: str, kernels: Any
) -> None:
    case = make_case(64, 64, outlier_rows(37, 4096, share, size), **options)
    if factors == "hadamard":
        case.tensors |= {"left": sylvester(64), "right": sylvester(64)}
    check(kernels(), case)


@pytest.mark.parametrize("g", [5, 16, 32])
def test_tac_alone_runs_in_float32(g: int, kernels: Any) -> None:
    inner = 960
    random = random_of(g)
    tensors = {
        "tac_matrix": torch.eye(g) + torch.randn(inner // g, g, g, generator=random) * 0.1,
        "tac_bias": torch.randn(inner, generator=random),
    }
    for bits in (4, 8):
        case = Case(torch.randn(5, inner, generator=random), tensors, {"bits": bits})
        for path in ("auto", "exact", "naive"):
            check(kernels(), case, path=path)


def test_codes_of_the_other_state_are_zero(kernels: Any) -> None:
    for axis in (0, 1):
        case = make_case(16, 24, torch.randn(5, 384, generator=random_of(axis)), gate_axis=axis, gate_size=3)
        codes = unpack_codes(kernels().quantize(case.x, **case.tensors, **case.options)[0], 4).reshape(5, 16, 24)
        for tile, state in zip(codes if axis == 0 else codes.transpose(1, 2), case.tensors["state"], strict=True):
            kept, dropped = (tile[-6:-3], tile[-3:]) if state == 1 else (tile[-3:], tile[-6:-3])
            assert kept.any() and not dropped.any()


@pytest.mark.parametrize(
    ("a", "b", "options"),
    [(64, 10, {}), (256, 4, {}), (8, 16, {"bits": 5}), (32, 20, {"a_group": 128}), (160, 16, {})],
    ids=str,
)
def test_what_the_tile_cannot_take_goes_elsewhere(a: int, b: int, options: dict[str, Any], kernels: Any) -> None:
    case = make_case(a, b, torch.randn(2, a * b, generator=random_of(a)), **options)
    with pytest.raises(ValueError, match="path: got tile, which cannot take these arguments"):
        check(kernels(), case)
    check(kernels(), case, path="auto")
