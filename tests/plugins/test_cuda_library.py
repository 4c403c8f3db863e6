"""What a kernel would read wrongly is refused by name before the call; a guard page is no help against a wrong type."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from plugins import toolchain
from plugins.cuda_library import CudaLibrary, Device
from tests.plugins.tools import made

F16, F32, F64 = torch.float16, torch.float32, torch.float64
M, K, N = 3, 128, 32


def zeros(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


GOOD: dict[str, dict[str, Any]] = {
    "quantize": {
        "x": zeros(M, K), "norm_weight": zeros(K), "channel_scale": zeros(K), "tac_matrix": zeros(8, 16, 16),
        "tac_bias": zeros(K), "left": zeros(8, 8), "right": zeros(16, 16), "state": zeros(M, dtype=torch.int32),
    },
    "linear": {
        "codes": zeros(M, K // 2, dtype=torch.int8), "scale": zeros(M, 1), "zero": zeros(M, 1, dtype=torch.int32),
        "weight": zeros(N, K // 2, dtype=torch.int8), "w_scale": zeros(N, 1), "w_sum": zeros(N, 1, dtype=torch.int32),
        "bias": zeros(N), "residual": zeros(M, N),
    },
    "head": {
        "codes": zeros(2, M, K, dtype=torch.int8), "scale": zeros(2, M, 1), "weight": zeros(N, K, dtype=torch.int8),
        "w_scale": zeros(N, 1), "logit_bias": zeros(N), "inv_temp": zeros(2), "top_k": 4,
    },
    "rotate": {"x": zeros(M, K), "blocks": zeros(8, 16, 16), "perm": torch.arange(K)},
}  # fmt: skip
TENSORS = [(op, name) for op, given in GOOD.items() for name in given if name != "top_k"]


@pytest.fixture(scope="module")
def library() -> CudaLibrary:
    path: Path = made(toolchain.build_host)
    return CudaLibrary(path, Device(80, 4, 166912))


def refused(library: CudaLibrary, op: str, **wrong: Any) -> str:
    with pytest.raises(ValueError) as caught:
        getattr(library, op)(**GOOD[op] | wrong)
    return str(caught.value)


@pytest.mark.parametrize("op", GOOD)
def test_what_fits_is_taken(library: CudaLibrary, op: str) -> None:
    getattr(library, op)(**GOOD[op])


@pytest.mark.parametrize(("op", "name"), TENSORS)
def test_every_tensor_has_its_type(library: CudaLibrary, op: str, name: str) -> None:
    tensor = GOOD[op][name]
    expected = "float32 or float16" if name in ("x", "residual") else str(tensor.dtype).removeprefix("torch.")
    for dtype in {F64, torch.bfloat16, torch.uint8}:
        given = str(dtype).removeprefix("torch.")
        assert refused(library, op, **{name: tensor.to(dtype)}) == f"{name}: got {given}, expected {expected}"


@pytest.mark.parametrize(("op", "name"), TENSORS)
def test_every_tensor_has_its_axes(library: CudaLibrary, op: str, name: str) -> None:
    tensor = GOOD[op][name]
    wrong = tensor.flatten()[0].clone()
    assert "got" in refused(library, op, **{name: wrong})
    assert "got" in refused(library, op, **{name: tensor[..., :-1].contiguous()})


@pytest.mark.parametrize(("op", "name"), TENSORS)
def test_every_tensor_is_contiguous_and_in_one_place(library: CudaLibrary, op: str, name: str) -> None:
    tensor = GOOD[op][name]
    doubled = torch.stack([tensor, tensor], dim=-1)[..., 0]
    strides = list(doubled.stride())
    assert refused(library, op, **{name: doubled}) == f"{name}: got strides {strides}, expected contiguous"
    if name not in ("x", "codes"):  # where these are, the others must be
        assert refused(library, op, **{name: tensor.to("meta")}) == f"{name}: got meta, expected cpu"


@pytest.mark.parametrize(
    ("op", "wrong", "reason"),
    [
        ("quantize", {"norm_weight": zeros(16)}, "norm_weight: got shape [16], expected [128]"),
        ("quantize", {"tac_matrix": zeros(4, 16, 16)}, "tac_matrix: got shape [4, 16, 16], expected [8, 16, 16]"),
        ("quantize", {"left": zeros(4, 8)}, "left: got shape [4, 8], expected [8, 8]"),
        ("quantize", {"state": zeros(2, dtype=torch.int32)}, "state: got 2 values, expected 3"),
        ("quantize", {"x": zeros()}, "x: got 0 axes, expected at least 1"),
        ("quantize", {"a_group": -128}, "a_group: got -128, expected 0 or a multiple of 128 that divides 128"),
        ("quantize", {"path": "fast"},
         "path: got fast, expected auto, naive, rows, tile, exact, small, large, hopper"),
        ("linear", {"codes": zeros(M, 32, dtype=torch.int8)}, "codes: got shape [3, 32], expected [3, 64]"),
        ("linear", {"scale": zeros(M)}, "scale: got shape [3], expected [3, 1]"),
        ("linear", {"w_scale": zeros(N, 2)}, "w_scale: got shape [32, 2], expected [32, 1]"),
        ("linear", {"residual": zeros(M, 16)}, "residual: got shape [3, 16], expected [3, 32]"),
        ("linear", {"weight": zeros(N, dtype=torch.int8)}, "weight: got 1 axes, expected 2"),
        ("linear", {"y_type": torch.bfloat16}, "y_type: got bfloat16, expected float32 or float16"),
        ("head", {"codes": zeros(M, K, dtype=torch.int8)}, "codes: got 2 axes, expected 3"),
        ("head", {"inv_temp": zeros(1)}, "inv_temp: got shape [1], expected [2]"),
        ("head", {"top_k": -1}, "top_k: got -1, expected 1..32"),
        ("rotate", {"blocks": zeros(4, 16, 16)}, "blocks: got shape [4, 16, 16], expected [8, 16, 16]"),
        ("rotate", {"perm": torch.arange(64)}, "perm: got shape [64], expected [128]"),
        ("rotate", {"perm": zeros(K, dtype=torch.int32)}, "perm: got int32, expected int64"),
        ("rotate", {"y_type": F64}, "y_type: got float64, expected float32 or float16"),
    ],
)  # fmt: skip
def test_reasons(library: CudaLibrary, op: str, wrong: dict[str, Any], reason: str) -> None:
    assert refused(library, op, **wrong) == reason


def test_rows_without_channels_are_refused_by_the_kernels_check(library: CudaLibrary) -> None:
    with pytest.raises(ValueError, match="inner: got 0"):
        library.quantize(zeros(M, 0))
    with pytest.raises(ValueError, match="inner: got 0"):
        library.rotate(zeros(M, 0), zeros(1, 0, 0), zeros(0, dtype=torch.int64))
