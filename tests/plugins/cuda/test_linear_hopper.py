"""Hopper's background products: equal bits to the torch reference for every format and tile, at every kind of edge."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from plugins.cuda_library import CudaLibrary
from tests.plugins.cuda.linear_cases import Case, assert_equal, draw, extremes, reference, run

Kernels = Callable[..., CudaLibrary]

F16, F32 = torch.float16, torch.float32

# a_bits, w_bits: s8 from nibbles on both sides, from nibbles of the weights, as it is.
FORMATS = {"wide": (4, 4), "int8_int4": (8, 4), "int8": (8, 8)}
# Tokens of a tile -> rows and number of SMs for which it takes the fewest rounds, for one tile of outputs.
TILES = {64: (129, 3), 128: (129, 2), 256: (201, 1)}


def check(kernels: Kernels, case: Case, num_sms: int = 1) -> None:
    inputs = draw(case)
    assert_equal(case, run(kernels(90, num_sms), case, inputs, "hopper"), reference(case, inputs))


@pytest.mark.parametrize("tokens", TILES)
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("stages", [1, 3, 13])
def test_stages(form: str, tokens: int, stages: int, kernels: Kernels) -> None:
    """Fewer stages than the ring holds, as many, and several rounds."""
    a_bits, w_bits = FORMATS[form]
    rows, num_sms = TILES[tokens]
    check(kernels, Case(rows, 32, 128 * stages, a_bits, w_bits, bias=True), num_sms)


@pytest.mark.parametrize("inner", [64, 192, 704])
@pytest.mark.parametrize("tokens", TILES)
def test_half_stages(tokens: int, inner: int, kernels: Kernels) -> None:
    """8-bit codes whose K ends in the middle of a stage."""
    rows, num_sms = TILES[tokens]
    check(kernels, Case(rows, 48, inner, 8, 8), num_sms)


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 31, 33, 37, 65, 127, 257])
@pytest.mark.parametrize("num_sms", [1, 4])
def test_rows(rows: int, num_sms: int, kernels: Kernels) -> None:
    check(kernels, Case(rows, 16, 256, residual=F32), num_sms)


@pytest.mark.parametrize("outputs", [16, 64, 80, 128, 144])
def test_outputs(outputs: int, kernels: Kernels) -> None:
    """A warp, a warpgroup, a block without outputs."""
    check(kernels, Case(9, outputs, 128, residual=F16, y_type=F16))


@pytest.mark.parametrize("num_sms", [1, 2, 5])
@pytest.mark.parametrize("form", FORMATS)
def test_tiles_of_a_block(form: str, num_sms: int, kernels: Kernels) -> None:
    """Blocks with several tiles, in which stages of a tile start anywhere in the ring."""
    a_bits, w_bits = FORMATS[form]
    check(kernels, Case(70, 272, 384, a_bits, w_bits, zero=True), num_sms)


@pytest.mark.parametrize("tokens", TILES)
@pytest.mark.parametrize(
    "case",
    [
        Case(0, 48, 384, zero=True),
        Case(0, 48, 384, a_bits=8, zero=True, bias=True, y_type=F16),
        Case(0, 48, 384, residual=F32, bias=True),
        Case(0, 48, 384, residual=F16, bias=True, y_type=F16),
        Case(0, 48, 384, swiglu=True),
        Case(0, 48, 384, swiglu=True, zero=True, bias=True, y_type=F16),
        Case(0, 48, 384, a_bits=3, w_bits=2, bias=True),
        Case(0, 48, 384, a_bits=6, w_bits=7, zero=True),
        Case(0, 48, 384, a_group=384, w_group=384, zero=True, bias=True),
        Case(0, 48, 384, a_group=384, residual=F32),
        Case(0, 48, 384, w_group=384, swiglu=True),
    ],
    ids=str,
)
def test_epilogue(case: Case, tokens: int, kernels: Kernels) -> None:
    rows, num_sms = TILES[tokens]
    check(kernels, replace(case, m=rows), num_sms)


@pytest.mark.parametrize("num_sms", [1, 3])
@pytest.mark.parametrize("zero", [False, True], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(("a_group", "w_group"), [(128, 0), (0, 128), (128, 128), (384, 384), (0, 256)])
def test_groups(form: str, a_group: int, w_group: int, zero: bool, num_sms: int, kernels: Kernels) -> None:
    a_bits, w_bits = FORMATS[form]
    check(kernels, Case(67, 80, 768, a_bits, w_bits, a_group, w_group, zero, bias=zero), num_sms)


@pytest.mark.parametrize("zero", [False, True], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("form", FORMATS)
def test_extreme_codes(form: str, zero: bool, kernels: Kernels) -> None:
    """Sums as far from 0 as K and the bits allow fit int32, also where they are held 16 or 256 times as large."""
    a_bits, w_bits = FORMATS[form]
    case = Case(1, 16, 65536 if w_bits == 8 else 131072, a_bits, w_bits, zero=zero)
    inputs = extremes(case)
    assert_equal(case, run(kernels(90, 1), case, inputs, "hopper"), reference(case, inputs))


def test_equals_naive_twin(kernels: Kernels) -> None:
    case = Case(75, 144, 512, zero=True, bias=True, residual=F32)
    inputs = draw(case)
    library = kernels(90, 2)
    assert torch.equal(run(library, case, inputs, "hopper"), run(library, case, inputs, "naive"))


def test_plan_takes_it(kernels: Kernels) -> None:
    """Above the small path's rows a Hopper GPU runs this one, other GPUs refuse it."""
    case = Case(65, 16, 128)
    inputs = draw(case)
    assert_equal(case, run(kernels(90), case, inputs), reference(case, inputs))
    with pytest.raises(ValueError, match="arch: got 80, expected 90 on the hopper path"):
        run(kernels(80), case, inputs, "hopper")
