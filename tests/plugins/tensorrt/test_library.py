"""The shipped plugin libraries: what they export and need, and that TensorRT's runtimes for aarch64 load theirs."""

import ctypes
import platform
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from plugins import toolchain
from tests.plugins.tensorrt import nodes
from tests.plugins.tensorrt.conftest import PLUGINS
from tests.plugins.tensorrt.harness import running
from tests.plugins.tools import made

MACHINES = ("x86_64", "aarch64")
SYSTEM = {
    "libstdc++",
    "libgcc_s",
    "libc",
    "libm",
    "libdl",
    "libpthread",
    "librt",
    "ld-linux-x86-64",
    "ld-linux-aarch64",
}
# The newest symbol versions on the oldest systems that run it, by library: Ubuntu 22.04 has glibc 2.35 and GCC 12.
NEWEST = {"GLIBC": (2, 34), "GLIBCXX": (3, 4, 30), "CXXABI": (1, 3, 13), "GCC": (12, 0, 0)}
RUNTIMES = {
    "lean 11.4": "aarch64/tensorrt_lean_libs/libnvinfer_lean.so.11",
    "RTX 1.7": "aarch64/tensorrt_rtx_libs/libtensorrt_rtx.so.1",
}


@pytest.fixture(scope="session")
def library() -> Callable[[str], Path]:
    return lambda machine: made(lambda: toolchain.build_plugin(machine))


def output(*command: str | Path) -> str:
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("machine", MACHINES)
def test_two_functions_are_exported(machine: str, library: Callable[[str], Path]) -> None:
    symbols = [line.split() for line in output("nm", "-D", library(machine)).splitlines()]
    assert {words[-1] for words in symbols if words[-2] not in "Uw"} == {"getCreators", "setLoggerFinder"}


@pytest.mark.parametrize("machine", MACHINES)
def test_only_the_system_is_needed(machine: str, library: Callable[[str], Path]) -> None:
    needed = re.findall(r"NEEDED.*\[([\w+-]+)\.so", output("readelf", "-d", library(machine)))
    assert needed and set(needed) <= SYSTEM, needed
    undefined = [line.split()[-1] for line in output("nm", "-D", "--undefined-only", library(machine)).splitlines()]
    assert [name for name in undefined if "nvinfer" in name or name.startswith("cu")] == []
    versions = {tuple(re.split("[@_]+", name)[-2:]) for name in undefined if "@" in name}
    assert versions
    for name, version in versions:
        assert tuple(map(int, version.split("."))) <= NEWEST[name], f"{name}_{version}"


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_runtime_for_aarch64_loads_it(runtime: str, library: Callable[[str], Path]) -> None:
    """A process under the emulator: the runtime takes the library, finds all plugins and makes one."""
    compiler, emulator = made(toolchain.aarch64_compiler), made(toolchain.aarch64_emulator)
    source = Path(__file__).with_name("load_plugins.cpp")
    flags = ("-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", f"-I{toolchain.CUDA.with_name('tensorrt')}")
    program = toolchain.compiled([str(compiler), *flags], source, ".run")
    command = [
        *emulator,
        str(program),
        str(made(lambda: toolchain.fetched(RUNTIMES[runtime]))),
        str(library("aarch64")),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout == "loaded\n", done.stdout + done.stderr
    assert "DllmcQuantize" in done.stderr, "a refusal says its reason"


@pytest.fixture(scope="session")
def cuda_harness() -> Path:
    """The harness whose tensors live on a GPU; it compiles, links and lists plugins without one."""

    def build() -> Path:
        nvcc, compiler = toolchain.nvcc(), toolchain.host_compiler()
        home = nvcc.resolve().parents[1]
        command = [str(nvcc), "-ccbin", str(compiler), "-std=c++17", "-Xcompiler=-Wall,-Wextra,-Werror"]
        command += ["-cudart=static", f"-L{home / 'lib'}", f"-L{home / 'lib64'}", "-ldl"]
        return toolchain.compiled(command, PLUGINS / "harness.cpp", ".run")

    return made(build)


def test_the_shipped_library_lists_its_plugins(cuda_harness: Path, library: Callable[[str], Path]) -> None:
    with running(cuda_harness, library("x86_64")) as harness:
        assert nodes.linear_node().plugin in harness.plugins()


def test_the_shipped_library_lives_on_a_gpu(cuda_harness: Path, library: Callable[[str], Path], tmp_path: Path) -> None:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        pytest.skip("no CUDA GPU (libcuda.so.1)")
    node = nodes.linear_node(bias=True)
    with running(cuda_harness, library(platform.machine())) as harness:
        answer, outputs = harness.live(node.plugin, node.attributes, node.inputs, tmp_path)
        assert outputs, f"{answer}\n{harness.reasons}"
    assert (outputs[0] == node.expected[0]).all()
