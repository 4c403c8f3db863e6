"""The linear for few tokens: equal bits to the torch reference and to its naive twin, for each format and tile."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from plugins.cuda_library import CudaLibrary
from tests.plugins.cuda.linear_cases import Case, assert_equal, draw, extremes, reference, run

Kernels = Callable[..., CudaLibrary]

F16, F32 = torch.float16, torch.float32

# (arch, a_bits, w_bits): Int4, Int4Wide, Int8Int4, Int8.
FORMATS = [(80, 4, 4), (90, 4, 4), (87, 8, 4), (120, 8, 8)]
EPILOGUES: list[dict[str, Any]] = [
    {"zero": True, "bias": True},
    {"residual": F32},
    {"swiglu": True, "y_type": F16},
    {"residual": F16, "y_type": F16, "zero": True},
]


def check(library: CudaLibrary, case: Case) -> None:
    inputs = draw(case)
    y = run(library, case, inputs, "small")
    assert_equal(case, y, reference(case, inputs))
    if not case.swiglu:
        assert torch.equal(y, run(library, case, inputs, "naive"))


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 16, 31, 33, 64])
@pytest.mark.parametrize(("arch", "a_bits", "w_bits"), FORMATS)
def test_equals_reference(rows: int, arch: int, a_bits: int, w_bits: int, kernels: Kernels) -> None:
    """Each tile of tokens, full and not; fewer K tiles than warps, then more than a round of the ring."""
    case = Case(rows, 16, 128, a_bits=a_bits, w_bits=w_bits, bias=True)
    check(kernels(arch, num_sms=1), case)
    check(kernels(arch, num_sms=1), replace(case, k=1152, n=80, **EPILOGUES[rows % len(EPILOGUES)]))


@pytest.mark.parametrize("outputs", [128, 144])
@pytest.mark.parametrize(("arch", "a_bits", "w_bits"), FORMATS)
def test_two_tiles_a_unit(outputs: int, arch: int, a_bits: int, w_bits: int, kernels: Kernels) -> None:
    """Wide matrices for 17 to 32 tokens; the last unit of 144 outputs has one tile only."""
    case = Case(19, outputs, 640, a_bits=a_bits, w_bits=w_bits, zero=True, bias=True, residual=F32)
    check(kernels(arch, num_sms=1), case)


@pytest.mark.parametrize("inner", [128 * tiles for tiles in (7, 8, 9, 15, 16, 17, 31, 33, 65)])
@pytest.mark.parametrize(("rows", "outputs"), [(3, 48), (32, 48), (32, 128), (40, 16)])
def test_walk_along_k(inner: int, rows: int, outputs: int, kernels: Kernels) -> None:
    """Warps with and without a last tile, rings that are and are not full at the end of a unit."""
    check(kernels(80, num_sms=1), Case(rows, outputs, inner))


@pytest.mark.parametrize(("inner", "group"), [(128, 128), (1152, 128), (2048, 256), (1920, 640), (768, 768)])
@pytest.mark.parametrize("rows", [4, 20, 37])
@pytest.mark.parametrize(("arch", "a_bits", "w_bits"), FORMATS)
def test_groups(inner: int, group: int, rows: int, arch: int, a_bits: int, w_bits: int, kernels: Kernels) -> None:
    """Sums over groups in ascending order: more and fewer groups than warps, last rounds that are not full."""
    case = Case(rows, 48, inner, a_bits, w_bits, a_group=group, w_group=group, zero=True, bias=True)
    check(kernels(arch, num_sms=1), case)
    check(kernels(arch, num_sms=1), replace(case, a_group=0, zero=rows == 4))
    check(kernels(arch, num_sms=1), replace(case, w_group=0, residual=F16, y_type=F16))


@pytest.mark.parametrize("num_sms", [1, 2, 3, 100])
def test_shares_of_blocks(num_sms: int, kernels: Kernels) -> None:
    """Blocks with several units, with one, and units that do not divide among them."""
    check(kernels(80, num_sms=num_sms), Case(5, 176, 256, bias=True))


@pytest.mark.parametrize("path", ["small", "naive"])
@pytest.mark.parametrize(("arch", "a_bits", "w_bits"), FORMATS)
def test_largest_sums(arch: int, a_bits: int, w_bits: int, path: str, kernels: Kernels) -> None:
    """The longest K of all largest codes and zero points: the sums, widened or shifted, stay below 2^31."""
    case = Case(1, 16, 1 << 16 if w_bits == 8 else 1 << 17, a_bits, w_bits, zero=True)
    inputs = extremes(case)
    assert_equal(case, run(kernels(arch), case, inputs, path), reference(case, inputs))


def test_too_many_rows(kernels: Kernels) -> None:
    """More tokens than the tile has: a reason."""
    case = Case(65, 16, 128)
    with pytest.raises(ValueError, match="rows: got 65, expected at most 64"):
        run(kernels(), case, draw(case), "small")
