"""What nvcc made of the kernels, read from the shipped libraries: the tensor-core instructions of every target.

`python -m plugins.cuda_census` renews the table of registers and memory that the last test compares with.
"""

import json
import re
import subprocess
from collections.abc import Iterator

import pytest

from plugins import cuda_census, toolchain
from plugins.cuda_census import SYSTEM_SHARED_BYTES, Census, Kernel
from plugins.cuda_launches import GPUS
from tests.plugins.tools import made

X86, JETSON = {"80", "86", "89", "90a", "120"}, {"87", "110"}
NATIVE_INT4 = {"80", "86", "87", "89"}
GEMMS = ("linear_small", "linear_large", "linear_hopper", "head_tiles")


@pytest.fixture(scope="session")
def census() -> Census:
    return made(cuda_census.whole_census)


def kernels(census: Census, pattern: str) -> Iterator[tuple[str, str, Kernel]]:
    """Target, name and kernel wherever the pattern is found in the name; at least one for every target."""
    for target, found in census.items():
        matches = [(target, name, kernel) for name, kernel in found.items() if re.search(pattern, name)]
        assert matches, f"no kernel of sm_{target} matches {pattern}"
        yield from matches


def tensor_core(kernel: Kernel) -> set[str]:
    """Its tensor-core instructions: shape and types."""
    return {name for name in kernel.instructions if re.match(r"[A-Z]*MMA\b", name)}


def test_targets(census: Census) -> None:
    assert set(census) == X86 | JETSON
    names = [set(kernels) for kernels in census.values()]
    assert all(other == names[0] for other in names), "every kernel is on every target, if only as a trap"


def test_four_bit_products_are_native_or_absent(census: Census) -> None:
    for target, name, kernel in kernels(census, r"\bInt4\b"):
        if target in NATIVE_INT4:
            assert tensor_core(kernel) == {"IMMA.16864.S4.S4"}, f"{name} of sm_{target}"
        else:
            assert kernel.is_trap and not tensor_core(kernel), f"{name} of sm_{target}"


def test_eight_bit_products_are_native(census: Census) -> None:
    for target, name, kernel in kernels(census, r"^(?!linear_hopper).*\b(Int4Wide|Int8Int4|Int8)\b"):
        assert tensor_core(kernel) == {"IMMA.16832.S8.S8"}, f"{name} of sm_{target}"
    for target, name, kernel in kernels(census, "^head_tiles"):
        assert tensor_core(kernel) == {"IMMA.16832.S8.S8"}, f"{name} of sm_{target}"


def test_warpgroup_products_are_on_hopper_alone(census: Census) -> None:
    for target, name, kernel in kernels(census, "^linear_hopper"):
        found = tensor_core(kernel)
        if target == "90a":
            assert found and all(re.match(r"IGMMA\.64x\d+x32\.S8\.S8", i) for i in found), f"{name}: {found}"
        else:
            assert kernel.is_trap and not found, f"{name} of sm_{target}"


def test_transforms_use_halves(census: Census) -> None:
    for target, name, kernel in kernels(census, "^quantize_tile"):
        assert tensor_core(kernel) == {"HMMA.16816.F32"}, f"{name} of sm_{target}"


def test_products_keep_all_in_registers(census: Census) -> None:
    for target, name, kernel in kernels(census, f"^({'|'.join(GEMMS)})"):
        spilled = kernel.stack, kernel.count("LDL"), kernel.count("STL")
        assert spilled == (0, 0, 0), f"{name} of sm_{target}: stack bytes, local loads and stores {spilled}"
    for gemm in GEMMS:
        assert list(kernels(census, f"^{gemm}"))


def test_no_plan_launches_what_its_target_lacks(census: Census) -> None:
    for target, found in census.items():
        launched = {name for name, kernel in found.items() if kernel.dynamic is not None}
        assert len(launched) > 30
        assert [name for name in launched if found[name].is_trap] == [], f"traps on sm_{target}"


def test_every_block_fits(census: Census) -> None:
    for target, found in census.items():
        limit = GPUS[target].block_kib * 1024
        for name, kernel in found.items():
            assert kernel.shared + (kernel.dynamic or 0) <= limit, f"{name} of sm_{target}"


def test_as_many_blocks_fit_an_sm_as_kernels_are_bound_for(census: Census) -> None:
    """Of tiles whose size is fixed; the quantiser's plan cuts its tiles to what a device has."""
    bounds = made(lambda: cuda_census.blocks_per_sm(toolchain.build_plugin("x86_64")))
    for target, name, kernel in kernels(census, f"^({'|'.join(GEMMS)}|rotate_tile)"):
        taken = bounds[name] * (kernel.shared + (kernel.dynamic or 0) + SYSTEM_SHARED_BYTES)
        most = GPUS[target].sm_kib * 1024
        if (name, most) == ("head_tiles<8, 1>", 100 * 1024):
            assert taken > most  # 64 rows of the head: one block an SM on the GPUs with least shared memory
        else:
            assert taken <= most, f"{name} of sm_{target}: {bounds[name]} blocks take {taken} of {most} bytes"


def test_ptx_is_of_the_eight_bit_path() -> None:
    """PTX with 4-bit products would be expanded on later GPUs into some 200 instructions each."""
    cuobjdump = made(lambda: toolchain.cuda_program("cuobjdump"))
    for machine, expected in (("x86_64", {"sm_90"}), ("aarch64", set())):
        library = made(lambda machine=machine: toolchain.build_plugin(machine))
        ptx = subprocess.run([cuobjdump, "--dump-ptx", library], capture_output=True, text=True, check=True).stdout
        assert set(re.findall(r"^\.target (\w+)", ptx, re.MULTILINE)) == expected
        assert ".s8.s8" in ptx or not expected
        assert ".s4" not in ptx and ".u4" not in ptx


def test_resources_are_as_written_down(census: Census) -> None:
    """Equal for the same nvcc; another one may differ by some registers, not by kernels and not by a spill."""
    written = json.loads(cuda_census.RESOURCES.read_text())
    found = json.loads(cuda_census.resources(census))
    renew = "python -m plugins.cuda_census renews the table"
    if written["nvcc"] == found["nvcc"]:
        assert written == found, renew
    assert written["kernels"].keys() == found["kernels"].keys(), renew
    for name, rows in found["kernels"].items():
        for before, now in zip(written["kernels"][name], rows, strict=True):
            assert (before is None) == (now is None), name
            if now is not None:
                assert now[0] <= 255 and now[1] <= before[1] + 64 and now[2:] == before[2:], f"{name}: {now}"
