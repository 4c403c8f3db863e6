"""The plugin library over the kernels as host C++, and the harness that drives it; without a compiler, a named skip."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from plugins import toolchain
from tests.plugins.tensorrt.harness import Harness, running
from tests.plugins.tools import made

PLUGINS = Path(toolchain.__file__).parent / "tensorrt"


def compile_plugins(*, kernels: list[Path], flags: tuple[str, ...] = ()) -> Path:
    """The plugin library over these objects of kernels."""
    compiler = str(toolchain.host_compiler())
    command = [compiler, f"@{toolchain.HOST_FLAGS}", *flags, "-c"]
    sources = [source for source in sorted(PLUGINS.glob("*.cpp")) if source.stem != "harness"]
    objects = [toolchain.compiled(command, source, ".o") for source in sources]
    exports = f"-Wl,--no-undefined,--version-script={PLUGINS / 'exports.map'}"
    link = [compiler, "-shared", exports, "-fsanitize=alignment,bounds"]
    return toolchain.linked(link, [*objects, *kernels], "dllmc_tensorrt_host")


def kernel_objects(*, without: tuple[str, ...] = ("c_api",)) -> list[Path]:
    command = [str(toolchain.host_compiler()), f"@{toolchain.HOST_FLAGS}", f"-I{toolchain.CUDA}", "-c"]
    return [toolchain.compiled(command, source, ".o") for source in toolchain.sources() if source.stem not in without]


@pytest.fixture(scope="session")
def plugin_library() -> Path:
    return made(lambda: compile_plugins(kernels=kernel_objects()))


@pytest.fixture(scope="session")
def harness_program() -> Path:
    command = ["-std=c++17", "-O1", "-DDLLMC_HOST", "-Wall", "-Wextra", "-Werror"]
    return made(lambda: toolchain.compiled([str(toolchain.host_compiler()), *command], PLUGINS / "harness.cpp", ".run"))


@pytest.fixture(scope="session")
def harness(harness_program: Path, plugin_library: Path) -> Iterator[Harness]:
    with running(harness_program, plugin_library) as driver:
        yield driver
