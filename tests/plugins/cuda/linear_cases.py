"""Random inputs of an integer linear, its reference, and what "equal" means for a kernel's answer.

Shape letters: M rows, K inner, N outputs, G groups.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from plugins.cuda_library import CudaLibrary
from plugins.int4 import code_limit, pack_codes
from plugins.integer_linear import integer_linear
from plugins.layout import to_layout
from tests.plugins.cuda.guard import guarded


@dataclass(frozen=True)
class Case:
    """One linear: M, N, K and its attributes."""

    m: int
    n: int
    k: int
    a_bits: int = 4
    w_bits: int = 4
    a_group: int = 0
    w_group: int = 0
    zero: bool = False
    bias: bool = False
    residual: torch.dtype | None = None
    swiglu: bool = False
    y_type: torch.dtype = torch.float32

    def __str__(self) -> str:
        return "-".join(f"{name}{value}" for name, value in vars(self).items() if value).replace("torch.", "")


Inputs = dict[str, Tensor | None]


def draw(case: Case, seed: int = 0) -> Inputs:
    """Codes over the whole range, extremes included; canonical and not packed."""
    generator = torch.Generator().manual_seed(hash((case.m, case.n, case.k, seed)) % 2**63)
    groups = case.k // (case.a_group or case.w_group or case.k)

    def integers(limit: int, *shape: int) -> Tensor:
        return torch.randint(-limit, limit + 1, shape, generator=generator, dtype=torch.int32)

    def floats(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(shape, generator=generator) * (high - low) + low

    weight = integers(code_limit(case.w_bits), case.n, case.k)
    scale = floats(0.01, 1, case.m, groups if case.a_group else 1)
    residual = None if case.residual is None else floats(-9, 9, case.m, case.n).to(case.residual)
    return {
        "codes": integers(code_limit(case.a_bits), case.m, case.k).to(torch.int8),
        "scale": scale,
        "zero": integers(code_limit(case.a_bits), *scale.shape) if case.zero else None,
        "weight": weight.to(torch.int8),
        "w_scale": floats(0.001, 0.1, case.n, groups if case.w_group else 1),
        "w_sum": weight.view(case.n, groups, -1).sum(-1, dtype=torch.int32) if case.zero else None,
        "bias": floats(-3, 3, case.n) if case.bias else None,
        "residual": residual,
    }


def extremes(case: Case) -> Inputs:
    """Inputs with every code and zero point at its limit: sums as far from 0 as they go, on the same side."""
    a_limit, w_limit = code_limit(case.a_bits), code_limit(case.w_bits)
    inputs = draw(case)
    inputs["codes"] = torch.full((case.m, case.k), a_limit, dtype=torch.int8)
    inputs["weight"] = torch.full((case.n, case.k), -w_limit, dtype=torch.int8)
    zero, w_sum = inputs["zero"], inputs["w_sum"]
    if zero is not None and w_sum is not None:
        inputs["zero"] = torch.full_like(zero, a_limit)
        inputs["w_sum"] = torch.full_like(w_sum, -w_limit * case.k // w_sum.shape[-1])
    return inputs


def reference(case: Case, inputs: Inputs) -> Tensor:
    """The torch reference, rounded to the output's type."""
    residual = inputs["residual"]
    arguments: dict[str, Any] = inputs | {"residual": None if residual is None else residual.float()}
    names = ("a_bits", "w_bits", "a_group", "w_group", "swiglu")
    y = integer_linear(**arguments, **{name: getattr(case, name) for name in names}, layout=0)
    return y.to(case.y_type)


def run(library: CudaLibrary, case: Case, inputs: Inputs, path: str = "auto", layout: int = 1) -> Tensor:
    """What the kernel of this path answers; every input ends where memory ends."""
    codes, weight = inputs["codes"], inputs["weight"]
    assert codes is not None and weight is not None
    arguments: dict[str, Any] = inputs | {
        "codes": pack_codes(codes, case.a_bits),
        "weight": to_layout(pack_codes(weight, case.w_bits), layout),
    }
    arguments = {name: None if tensor is None else guarded(tensor) for name, tensor in arguments.items()}
    names = ("a_bits", "w_bits", "a_group", "w_group", "swiglu", "y_type")
    return library.linear(**arguments, **{name: getattr(case, name) for name in names}, layout=layout, path=path)


def assert_equal(case: Case, y: Tensor, expected: Tensor) -> None:
    """Equal bits; with SwiGLU 4 units in the last place of float32 (exp 2, sum, quotient), 1 of float16 where rounded.

    Where exp overflows a silu below 2^-120 is lost, here times at most 2^20.
    """
    assert y.shape == expected.shape
    assert not y.isnan().any(), f"{int(y.isnan().sum())} of {y.numel()} outputs were not written"
    if not case.swiglu:
        kind = torch.int32 if case.y_type == torch.float32 else torch.int16
        wrong = y.view(kind) != expected.view(kind)
        assert not wrong.any(), f"{int(wrong.sum())} of {y.numel()} differ, first at {wrong.nonzero()[0].tolist()}"
        return
    step, floor = (4 * 2.0**-23, 2.0**-100) if case.y_type == torch.float32 else (2.0**-10, 2.0**-24)
    error = (y.double() - expected.double()).abs()
    right = (y == expected) | (error <= expected.double().abs() * step + floor)  # equal infinities differ by NaN
    assert right.all(), f"{int((~right).sum())} of {y.numel()} differ, first at {(~right).nonzero()[0].tolist()}"
