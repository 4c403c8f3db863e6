"""Many tokens: equal bits to the torch reference and to the textbook kernel, every format, tile and kind of edge."""

from collections.abc import Callable

import pytest
import torch

from plugins.cuda_library import CudaLibrary
from tests.plugins.cuda.linear_cases import Case, assert_equal, draw, extremes, reference, run

F16, F32 = torch.float16, torch.float32

# Architecture, a_bits, w_bits: s4, s8 from nibbles on both sides, s8 from nibbles of the weights, s8.
FORMATS = {"int4": (80, 4, 4), "wide": (120, 4, 4), "int8_int4": (86, 8, 4), "int8": (89, 8, 8)}
# One SM gets the fewest blocks, many get the smallest ones.
SMS = {"128x128": 1, "64x64": 64}


def check(kernels: Callable[..., CudaLibrary], case: Case, arch: int = 80, num_sms: int = 1) -> None:
    inputs, library = draw(case), kernels(arch, num_sms)
    y = run(library, case, inputs, "large")
    assert_equal(case, y, reference(case, inputs))
    assert_equal(case, y, run(library, case, inputs, "naive"))


@pytest.mark.parametrize("tile", SMS)
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(("m", "n"), [(1, 16), (31, 80), (65, 144), (129, 272)])
@pytest.mark.parametrize("tiles", [1, 2, 7])
def test_tiles(form: str, tile: str, m: int, n: int, tiles: int, kernels: Callable[..., CudaLibrary]) -> None:
    arch, a_bits, w_bits = FORMATS[form]
    k = tiles * (64 if w_bits == 8 else 128)
    check(kernels, Case(m, n, k, a_bits, w_bits, bias=True), arch, SMS[tile])


@pytest.mark.parametrize("m", [7, 8, 9, 33, 37, 63, 64, 127, 128])
@pytest.mark.parametrize("tile", SMS)
def test_rows(m: int, tile: str, kernels: Callable[..., CudaLibrary]) -> None:
    check(kernels, Case(m, 32, 256), num_sms=SMS[tile])


@pytest.mark.parametrize("n", range(16, 273, 16))
def test_outputs(n: int, kernels: Callable[..., CudaLibrary]) -> None:
    check(kernels, Case(9, n, 128, residual=F32))


@pytest.mark.parametrize("tile", SMS)
@pytest.mark.parametrize(
    "case",
    [
        Case(70, 48, 384, zero=True),
        Case(70, 48, 384, a_bits=8, zero=True, bias=True, y_type=F16),
        Case(70, 48, 384, residual=F32),
        Case(70, 48, 384, residual=F16, bias=True, y_type=F16),
        Case(70, 48, 384, swiglu=True),
        Case(70, 48, 384, swiglu=True, zero=True, bias=True, y_type=F16),
        Case(70, 48, 384, a_bits=8, w_bits=8, swiglu=True, y_type=F16),  # infinities
        Case(70, 48, 384, a_bits=8, w_bits=8, swiglu=True, bias=True),  # exp overflows
        Case(70, 48, 384, a_bits=3, w_bits=2, bias=True),
        Case(70, 48, 384, a_bits=5, w_bits=3),
        Case(70, 48, 384, a_bits=6, w_bits=7, zero=True),
        Case(70, 48, 384, a_group=384, w_group=384, zero=True, bias=True),
        Case(70, 48, 384, a_group=384, bias=True),
    ],
    ids=str,
)
def test_epilogue(case: Case, tile: str, kernels: Callable[..., CudaLibrary]) -> None:
    check(kernels, case, num_sms=SMS[tile])


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("zero", [False, True], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize(("a_group", "w_group"), [(128, 0), (0, 128), (128, 128), (384, 384), (0, 256)])
def test_groups(form: str, a_group: int, w_group: int, zero: bool, kernels: Callable[..., CudaLibrary]) -> None:
    arch, a_bits, w_bits = FORMATS[form]
    check(kernels, Case(37, 80, 768, a_bits, w_bits, a_group, w_group, zero, bias=zero), arch)


@pytest.mark.parametrize(
    "case",
    [
        Case(129, 272, 512, w_group=128, residual=F16, y_type=F16),
        Case(65, 144, 512, w_group=256, swiglu=True, y_type=F16),
        Case(1, 16, 256, a_group=128),
        Case(66, 160, 256, a_bits=7, a_group=128, w_group=128, zero=True, residual=F32),
    ],
    ids=str,
)
def test_group_edges(case: Case, kernels: Callable[..., CudaLibrary]) -> None:
    check(kernels, case)


@pytest.mark.parametrize("arch", [80, 120])
def test_extreme_sums(arch: int, kernels: Callable[..., CudaLibrary]) -> None:
    """The largest group there is, every product 49: still below the 2^22 to which group sums convert exactly."""
    case = Case(2, 16, 2 * 32768, a_group=32768, zero=True)
    inputs = extremes(case)
    assert_equal(case, run(kernels(arch), case, inputs, "large"), reference(case, inputs))


@pytest.mark.parametrize("zero", [False, True], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("form", ["wide", "int8_int4", "int8"])
def test_extreme_codes(form: str, zero: bool, kernels: Callable[..., CudaLibrary]) -> None:
    """Sums as far from 0 as K and the bits allow fit int32, also where they are held 16 or 256 times as large."""
    arch, a_bits, w_bits = FORMATS[form]
    case = Case(1, 16, 65536 if w_bits == 8 else 131072, a_bits, w_bits, zero=zero)
    inputs = extremes(case)
    assert_equal(case, run(kernels(arch), case, inputs, "large"), reference(case, inputs))


@pytest.mark.parametrize(("m", "n", "num_sms"), [(1100, 144, 1), (700, 80, 64)])
def test_panels(m: int, n: int, num_sms: int, kernels: Callable[..., CudaLibrary]) -> None:
    """More token tiles than a panel holds, the last panel not full, several output tiles."""
    check(kernels, Case(m, n, 128), num_sms=num_sms)
