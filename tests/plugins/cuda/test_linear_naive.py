"""The textbook linear: equal bits to the torch reference in both layouts."""

from collections.abc import Callable

import pytest
import torch

from plugins.cuda_library import CudaLibrary
from tests.plugins.cuda.linear_cases import Case, assert_equal, draw, reference, run

F16, F32 = torch.float16, torch.float32


@pytest.mark.parametrize("layout", [0, 1])
@pytest.mark.parametrize(
    "case",
    [
        Case(1, 16, 128),
        Case(3, 48, 256, zero=True, bias=True, residual=F32),
        Case(5, 32, 384, swiglu=True, y_type=F16),
        Case(2, 32, 256, swiglu=True, zero=True),
        Case(4, 16, 256, a_bits=8, residual=F16, y_type=F16),
        Case(4, 32, 192, a_bits=8, w_bits=8, bias=True),
        Case(2, 16, 512, a_group=128, w_group=128, zero=True),
        Case(2, 16, 512, a_group=256),
        Case(2, 16, 384, w_group=128, a_bits=6, w_bits=3, bias=True),
        Case(3, 16, 256, a_bits=5, w_bits=7, a_group=128, zero=True),
    ],
)
def test_equals_reference(case: Case, layout: int, kernels: Callable[..., CudaLibrary]) -> None:
    """Every format, group, epilogue and layout once."""
    inputs = draw(case)
    assert_equal(case, run(kernels(), case, inputs, "naive", layout), reference(case, inputs))
