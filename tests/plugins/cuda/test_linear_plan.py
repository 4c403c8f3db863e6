"""What the integer linear refuses, and the path and tile it takes for every shape of LLaDA-8B and Dream-7B."""

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from plugins.cuda_library import PATHS, CudaLibrary, Device, Launch, LinearArgs, check_reason
from tests.plugins.cuda.conftest import SHARED_BYTES

GOOD: dict[str, Any] = {"rows": 8, "inner": 256, "outputs": 32, "a_bits": 4, "w_bits": 4, "layout": 1}
GROUP = "expected 0 or a multiple of 128, at most 32768, that divides 256"

# K, N of a block's linears.
SHAPES = [
    *((4096, 12288), (4096, 4096), (4096, 24576), (12288, 4096)),
    *((3584, 4608), (3584, 3584), (3584, 37888), (18944, 3584)),
]
ROWS = [*range(1, 131), 200, 255, 256, 257, 512, 1000, 1024, 2048, 4096, 8191, 8192]
# A small, a usual and a large part of each architecture.
NUM_SMS = {80: (108,), 86: (30, 84), 87: (8, 16), 89: (58, 128, 142), 90: (114, 132), 110: (20,), 120: (36, 170)}


class Plan(ctypes.Structure):
    """linear.h."""

    _fields_ = tuple((name, ctypes.c_int32) for name in ("path", "tile_tokens", "tile_outputs", "shared_bytes"))


def plan(library: CudaLibrary, path: str = "auto", **fields: Any) -> Plan | str:
    """The plan, or why there is none."""
    call = library._library.dllmc_linear_plan
    call.restype = ctypes.c_char_p
    result = Plan()
    launch = Launch(device=library.device, path=PATHS[path])
    reason = call(ctypes.byref(LinearArgs(**GOOD | fields)), ctypes.byref(launch), ctypes.byref(result))
    return reason.decode() if reason else result


def workspace(library: CudaLibrary, **fields: Any) -> int:
    args = LinearArgs(**GOOD | fields)
    return int(library._library.dllmc_linear_workspace(ctypes.byref(args), ctypes.byref(library.device)))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"rows": -1}, "rows: got -1, expected 0..1048576"),
        ({"rows": 2**20 + 1}, "rows: got 1048577, expected 0..1048576"),
        ({"rows": 2**40}, f"rows: got {2**40}, expected 0..1048576"),
        ({"inner": 0}, "inner: got 0, expected a multiple of 128 in 128..131072"),
        ({"inner": 192}, "inner: got 192, expected a multiple of 128 in 128..131072"),
        ({"inner": -128}, "inner: got -128, expected a multiple of 128 in 128..131072"),
        ({"inner": 131072 + 128}, "inner: got 131200, expected a multiple of 128 in 128..131072"),
        ({"inner": 96, "a_bits": 8, "w_bits": 8}, "inner: got 96, expected a multiple of 64 in 64..65536"),
        ({"inner": 65536 + 64, "a_bits": 8, "w_bits": 5}, "inner: got 65600, expected a multiple of 64 in 64..65536"),
        ({"outputs": 0}, "outputs: got 0, expected a multiple of 16 in 16..262144"),
        ({"outputs": 24}, "outputs: got 24, expected a multiple of 16 in 16..262144"),
        ({"outputs": 2**18 + 16}, "outputs: got 262160, expected a multiple of 16 in 16..262144"),
        ({"a_bits": 1}, "a_bits: got 1, expected 2..8"),
        ({"a_bits": 16}, "a_bits: got 16, expected 2..8"),
        ({"w_bits": 0}, "w_bits: got 0, expected 2..8"),
        ({"a_bits": 8, "w_bits": 9}, "w_bits: got 9, expected 2..8"),
        ({"w_bits": 8}, "w_bits: got 8, expected 2..4 with a_bits 4"),
        ({"a_group": 64}, f"a_group: got 64, {GROUP}"),
        ({"a_group": -128}, f"a_group: got -128, {GROUP}"),
        ({"w_group": 384}, f"w_group: got 384, {GROUP}"),
        ({"inner": 131072, "w_group": 65536}, "w_group: got 65536, expected 0 or a multiple of 128, at most 32768, "),
        ({"a_group": 128, "w_group": 256}, "w_group: got 256, expected 0 or 128 as a_group"),
        ({"swiglu": 2}, "swiglu: got 2, expected 0 or 1"),
        ({"swiglu": 1, "residual": 16}, "residual: got one, expected none with swiglu"),
        ({"layout": 2}, "layout: got 2, expected 0 or 1"),
        ({"layout": -1}, "layout: got -1, expected 0 or 1"),
        ({"y_type": 2}, "y_type: got 2, expected 0 (float32) or 1 (float16)"),
        ({"residual_type": -1}, "residual_type: got -1, expected 0 (float32) or 1 (float16)"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_fields(fields: dict[str, Any], reason: str, kernels: Callable[..., CudaLibrary]) -> None:
    found = check_reason(kernels(), "linear", **GOOD | fields)
    assert found is not None
    assert found.startswith(reason)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"rows": 0},
        {"rows": 2**20},
        {"inner": 131072, "outputs": 2**18},
        {"inner": 64, "outputs": 16, "a_bits": 8, "w_bits": 8},
        {"inner": 65536, "a_bits": 8, "w_bits": 8},
        {"inner": 131072, "a_bits": 8, "w_bits": 8, "w_group": 32768},
        {"inner": 131072, "a_bits": 8},
        {"a_bits": 2, "w_bits": 2, "layout": 0},
        {"a_bits": 8, "w_bits": 3},
        {"a_group": 128, "w_group": 128},
        {"a_group": 256},
        {"w_group": 128, "swiglu": 1, "y_type": 1},
        {"residual": 16, "residual_type": 1},
    ],
    ids=str,
)
def test_good_fields(fields: dict[str, Any], kernels: Callable[..., CudaLibrary]) -> None:
    assert check_reason(kernels(), "linear", **GOOD | fields) is None


def run_reason(library: CudaLibrary, **fields: Any) -> str | None:
    """What run() says before it launches anything."""
    args, launch = LinearArgs(**GOOD | fields), Launch(device=library.device)
    reason = library._library.dllmc_linear(ctypes.byref(args), ctypes.byref(launch))
    return reason.decode() if reason else None


@pytest.mark.parametrize("field", ["codes", "scale", "weight", "w_scale", "w_sum", "y"])
def test_missing_pointers(field: str, kernels: Callable[..., CudaLibrary]) -> None:
    pointers = dict.fromkeys(("codes", "scale", "zero", "weight", "w_scale", "w_sum", "y"), 16)
    assert run_reason(kernels(), **pointers | {field: 0}) == f"{field}: got no pointer, expected one"


@pytest.mark.parametrize("field", ["codes", "scale", "zero", "weight", "w_scale", "w_sum", "bias", "residual", "y"])
def test_misaligned_pointers(field: str, kernels: Callable[..., CudaLibrary]) -> None:
    names = ("codes", "scale", "zero", "weight", "w_scale", "w_sum", "bias", "residual", "y")
    pointers = dict.fromkeys(names, 4096) | {field: 4100}
    assert run_reason(kernels(), **pointers) == f"{field}: got an address 4 bytes off, expected a multiple of 16"


def test_run_checks(host_library: Path, kernels: Callable[..., CudaLibrary]) -> None:
    library = kernels()
    assert run_reason(library, outputs=24) == check_reason(library, "linear", **GOOD | {"outputs": 24})
    assert run_reason(library, rows=0) is None
    old = CudaLibrary(host_library, Device(75, 40, 65536))
    assert run_reason(old) == "arch: got 75, expected 80 or newer"
    assert plan(old, "naive") == "arch: got 75, expected 80 or newer"
    assert plan(CudaLibrary(host_library, Device(80, 0, 65536))) == "num_sms: got 0, expected at least 1"
    small = CudaLibrary(host_library, Device(80, 4, 16384))
    assert plan(small, "large", rows=4096) == "shared_bytes: got 16384, expected at least 24576"


@pytest.mark.parametrize(
    ("path", "arch", "fields", "reason"),
    [
        ("small", 80, {"rows": 65}, "rows: got 65, expected at most 64 on the small path"),
        ("small", 80, {"layout": 0}, "layout: got 0, expected 1 on the small path"),
        ("large", 80, {"layout": 0}, "layout: got 0, expected 1 on the large path"),
        ("hopper", 90, {"layout": 0}, "layout: got 0, expected 1 on the hopper path"),
        ("hopper", 80, {}, "arch: got 80, expected 90 on the hopper path"),
        ("hopper", 120, {}, "arch: got 120, expected 90 on the hopper path"),
        ("rows", 80, {}, "path: got rows, expected auto, naive, small, large or hopper"),
    ],
)
def test_paths_there_are_not(
    path: str, arch: int, fields: dict[str, Any], reason: str, kernels: Callable[..., CudaLibrary]
) -> None:
    assert plan(kernels(arch), path, **fields) == reason


@pytest.mark.parametrize("arch", NUM_SMS)
@pytest.mark.parametrize(("k", "n"), SHAPES)
@pytest.mark.parametrize(("a_bits", "w_bits", "w_group"), [(4, 4, 0), (8, 4, 0), (8, 8, 0), (4, 4, 128)])
def test_plans(
    arch: int, k: int, n: int, a_bits: int, w_bits: int, w_group: int, kernels: Callable[..., CudaLibrary]
) -> None:
    for num_sms in NUM_SMS[arch]:
        library = kernels(arch, num_sms)
        for rows in ROWS:
            fields = {"rows": rows, "inner": k, "outputs": n, "a_bits": a_bits, "w_bits": w_bits, "w_group": w_group}
            assert check_reason(library, "linear", **GOOD | fields) is None
            assert workspace(library, **fields) == 0
            for path in ("auto", "large"):
                chosen = plan(library, path, **fields)
                assert isinstance(chosen, Plan), chosen
                expected = "small" if rows <= 64 else "hopper" if arch == 90 else "large"
                assert chosen.path == PATHS[expected if path == "auto" else "large"]
                if chosen.path == PATHS["large"]:
                    check_tile(chosen, rows, n, num_sms, arch, bool(w_group))


def check_tile(chosen: Plan, rows: int, n: int, num_sms: int, arch: int, grouped: bool) -> None:
    """Shared memory fits as often as blocks should fit an SM; the small tile only where it shortens the longest SM."""
    tile = (chosen.tile_tokens, chosen.tile_outputs)
    blocks_per_sm = 4 if tile == (64, 64) else 2
    reserved = 1024
    assert blocks_per_sm * (chosen.shared_bytes + reserved) <= SHARED_BYTES[arch] + reserved
    if grouped:
        assert tile == (64, 128)
        return
    longest = {(t, o): -(-(-(-rows // t) * -(-n // o)) // num_sms) * t * o for t, o in ((128, 128), (64, 64))}
    assert tile in longest
    if tile == (64, 64):
        assert longest[tile] * 4 / 3 < longest[128, 128]
    else:
        assert longest[tile] <= longest[64, 64] * 4 / 3


@pytest.mark.parametrize("arch", NUM_SMS)
def test_rows_in_memory_order_are_naive(arch: int, kernels: Callable[..., CudaLibrary]) -> None:
    for rows in (1, 64, 65, 1024):
        chosen = plan(kernels(arch), rows=rows, layout=0)
        assert isinstance(chosen, Plan)
        assert chosen.path == PATHS["naive"]
