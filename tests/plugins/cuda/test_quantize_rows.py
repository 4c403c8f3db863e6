"""The row kernel: codes, scale and zero equal to the reference without a norm, within a derived bound with one."""

import ctypes
from pathlib import Path
from typing import Any

import pytest
import torch

from plugins.cuda_library import CudaLibrary, Device, Launch, QuantizeArgs, check_reason
from plugins.int4 import code_limit
from plugins.prepare import prepare
from plugins.quantize import quantize
from tests.plugins.cuda.quantize_cases import EPSILON, assert_equal, assert_near, assert_rare, hard_rows


@pytest.mark.parametrize("path", ["rows", "naive"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_equals_the_reference(bits: int, symmetric: bool, path: str, kernels: Any) -> None:
    x = hard_rows(384, seed=bits)
    for dtype in (torch.float32, torch.float16):
        for a_group in (0, 128):
            options: dict[str, Any] = {"bits": bits, "symmetric": symmetric, "a_group": a_group}
            found = kernels().quantize(x.to(dtype), **options, path=path)
            assert_equal(found, quantize(x.to(dtype), **options), bits)


@pytest.mark.parametrize("path", ["rows", "naive"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_channel_scale_clip_ratios_and_groups(symmetric: bool, path: str, kernels: Any) -> None:
    inner = 768
    scale = torch.rand(inner, generator=torch.Generator().manual_seed(1)) + 0.5
    cases = [(4, 256, 0.9, 0.7), (4, 0, 0.7, 0.9), (8, 384, 0.5, 0.95), (3, 768, 1.0, 0.3)]
    for bits, a_group, clip_lo, clip_hi in cases:
        options: dict[str, Any] = {
            "bits": bits,
            "symmetric": symmetric,
            "a_group": a_group,
            "clip_lo": clip_lo,
            "clip_hi": clip_hi,
        }
        x = hard_rows(inner, seed=a_group)
        found = kernels().quantize(x, channel_scale=scale, **options, path=path)
        assert_equal(found, quantize(x, channel_scale=scale, **options), bits)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_neighbours_of_halves_are_divided(bits: int, symmetric: bool, kernels: Any) -> None:
    """x / s within one float of a half, where a product with 1 / s would round to the other side."""
    limit = code_limit(bits)
    peak = torch.rand(64, 1, generator=torch.Generator().manual_seed(bits)) + 1
    scale = peak / limit
    half = (torch.arange(limit) + 0.5) * scale
    near = [torch.nextafter(half, torch.zeros(())), half, torch.nextafter(half, torch.full((), 9.0))]
    x = torch.cat([peak, -peak, *near], dim=-1)
    assert ((x * (1 / scale)).round() != (x / scale).round()).any()
    x = torch.cat([x, torch.zeros(64, 512 - x.shape[-1])], dim=-1)
    assert_equal(
        kernels().quantize(x, bits=bits, symmetric=symmetric), quantize(x, bits=bits, symmetric=symmetric), bits
    )


@pytest.mark.parametrize("value", [1e-44, 1e-38, 1e-30, 1e30, 3e38])
def test_scales_at_the_ends_of_float32(value: float, kernels: Any) -> None:
    x = torch.linspace(-1, 1, 128).mul(value).reshape(1, -1)
    for symmetric in (True, False) if value < 1e38 else (True,):
        assert_equal(kernels().quantize(x, symmetric=symmetric), quantize(x, symmetric=symmetric), 4)


@pytest.mark.parametrize("rows", [0, 1, 7, 33])
@pytest.mark.parametrize("inner", [64, 128, 192, 1088])
def test_any_number_of_rows_and_leading_axes(inner: int, rows: int, kernels: Any) -> None:
    x = torch.randn(rows, inner, generator=torch.Generator().manual_seed(rows))
    assert_equal(kernels().quantize(x), quantize(x), 4)
    folded = x.reshape(rows, 1, inner)
    codes, scale, _ = kernels().quantize(folded, bits=8)
    assert codes.shape == (rows, 1, inner) and scale.shape == (rows, 1, 1)
    assert torch.equal(codes, quantize(folded, bits=8)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("inner", [4096, 3584, 12288, 18944])
def test_rows_of_real_models(inner: int, dtype: torch.dtype, kernels: Any) -> None:
    x = hard_rows(inner)[3:6].to(dtype)
    for symmetric in (True, False):
        assert_equal(kernels().quantize(x, symmetric=symmetric), quantize(x, symmetric=symmetric), 4)


def test_a_row_too_long_for_registers_takes_the_naive_path(kernels: Any) -> None:
    x = torch.randn(1, 32832, generator=torch.Generator().manual_seed(2))
    assert_equal(kernels().quantize(x), quantize(x), 4)
    with pytest.raises(ValueError, match="path: got rows"):
        kernels().quantize(x, path="rows")


@pytest.mark.parametrize("path", ["rows", "naive"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("inner", "a_group"), [(128, 0), (1024, 256), (4096, 0)])
def test_norm(inner: int, a_group: int, symmetric: bool, path: str, kernels: Any) -> None:
    """Half of the roundings of a sum of squares (32 in a thread, 10 more); mean, eps, root, 1 / root, 3 products."""
    relative = ((32 + 10) / 2 + 7) * EPSILON / 2
    random = torch.Generator().manual_seed(inner)
    weight, scale = torch.rand(inner, generator=random) + 0.5, torch.rand(inner, generator=random) + 0.5
    for bits in (4, 8):
        for dtype, eps in ((torch.float32, 1e-5), (torch.float16, 0.5)):
            x = hard_rows(inner, seed=bits).to(dtype)
            options: dict[str, Any] = {"bits": bits, "symmetric": symmetric, "a_group": a_group}
            found = kernels().quantize(x, norm_weight=weight, channel_scale=scale, eps=eps, **options, path=path)
            y = prepare(x, weight, scale, eps=eps)
            assert_rare(assert_near(found, y, y.double().abs() * relative, options))


GOOD: dict[str, Any] = {"rows": 1, "inner": 128, "bits": 4, "symmetric": 1, "clip_lo": 1.0, "clip_hi": 1.0}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"inner": 96}, "inner: got 96, expected a multiple of 64"),
        ({"inner": 0}, "inner: got 0"),
        ({"rows": -1}, "rows: got -1"),
        ({"bits": 9}, "bits: got 9, expected 2 to 8"),
        ({"symmetric": 2}, "symmetric: got 2"),
        ({"a_group": 64}, "a_group: got 64, expected 0 or a multiple of 128 that divides 128"),
        ({"clip_hi": 0.0}, "clip_hi: got 0, expected above 0 to 1"),
        ({"clip_lo": float("nan")}, "clip_lo: got nan"),
        ({"eps": -1.0}, "eps: got -1"),
        ({"x_type": 2}, "x_type: got 2"),
        ({"tac_block": 7}, "tac_block: got 7, expected 0 or a divisor of 128"),
        ({"left_size": 8}, "left_size, right_size: got 8 x 0, expected a product of 128"),
        ({"left_size": 8, "right_size": 16, "gate_axis": 2}, "gate_axis: got 2"),
        ({"left_size": 8, "right_size": 16, "gate_size": 5}, "gate_size: got 5, expected 0 to 4"),
    ],
)
def test_refusals(fields: dict[str, Any], message: str, kernels: Any) -> None:
    assert check_reason(kernels(), "quantize", **GOOD) is None
    assert message in (check_reason(kernels(), "quantize", **GOOD | fields) or "")


def test_an_old_gpu_is_refused(host_library: Path) -> None:
    with pytest.raises(ValueError, match="arch: got 75, expected 80 or newer"):
        CudaLibrary(host_library, Device(75, 40, 65536)).quantize(torch.zeros(1, 128))


def test_pointers_are_looked_at_when_it_runs(kernels: Any) -> None:
    x = torch.zeros(2, 132)
    with pytest.raises(ValueError, match="x: got an address 4 bytes off, expected a multiple of 16"):
        kernels().quantize(x.flatten()[1:129].reshape(1, 128))
    with pytest.raises(ValueError, match="state: got a tensor, expected none"):
        kernels().quantize(torch.zeros(1, 128), state=torch.zeros(1, dtype=torch.int32))


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        *((field, {}) for field in ("x", "codes", "scale")),
        ("zero", {"symmetric": 0}),
        *((field, {"tac_block": 16}) for field in ("tac_matrix", "tac_bias")),
        *((field, {"left_size": 8, "right_size": 16}) for field in ("left", "right")),
    ],
)
def test_missing_pointers(field: str, fields: dict[str, int], kernels: Any) -> None:
    library = kernels()
    names = ("x", "codes", "scale", "zero", "tac_matrix", "tac_bias", "left", "right")
    args = QuantizeArgs(**GOOD | fields | dict.fromkeys(names, 4096) | {field: 0})
    launch = Launch(device=library.device)
    reason = library._library.dllmc_quantize(ctypes.byref(args), ctypes.byref(launch))
    assert reason.decode() == f"{field}: got no pointer, expected one"
