"""Our declaration of TensorRT's plugin interface is binary the same as the official headers'.

`abi.txt` holds what the official headers 10.0, 10.3, 10.16 and 11.1 declare, all four alike. They are not ours to give
away; $DLLMC_TENSORRT_HEADERS may name folders that hold such headers (a: separated list), which are compared then, too.
"""

import os
import subprocess
from pathlib import Path

import pytest

from plugins import toolchain
from tests.plugins.tensorrt import nodes
from tests.plugins.tensorrt.conftest import PLUGINS, compile_plugins, kernel_objects
from tests.plugins.tensorrt.harness import fields_of, running
from tests.plugins.tools import made

HERE = Path(__file__).parent
FOLDERS = [*filter(None, os.environ.get("DLLMC_TENSORRT_HEADERS", "").split(os.pathsep))]
FLAGS = ("-std=c++17", "-Wall", "-Wextra", "-Werror")


@pytest.fixture(params=FOLDERS or [None])
def official(request: pytest.FixtureRequest) -> tuple[str, ...]:
    """Flags that put one folder's official headers in place of our own declaration."""
    folder = request.param
    if not folder:
        pytest.skip("no official headers ($DLLMC_TENSORRT_HEADERS); without them abi.txt is what is compared with")
    assert (Path(folder) / "NvInferRuntime.h").exists(), f"no NvInferRuntime.h in {folder}"
    homes = [made(toolchain.nvcc).resolve().parents[1], Path("/usr/local/cuda")]
    cuda = [str(home / "include") for home in homes if (home / "include" / "cuda_runtime_api.h").exists()]
    return ("-DDLLMC_TRT_HEADERS=1", "-isystem", folder, *(word for path in cuda for word in ("-isystem", path)))


def declared(flags: tuple[str, ...]) -> str:
    """What the headers under these flags declare."""
    command = [str(toolchain.host_compiler()), *FLAGS, *flags, f"-I{PLUGINS}"]
    program = toolchain.compiled(command, HERE / "abi_probe.cpp", ".run")
    return subprocess.run([program], capture_output=True, text=True, check=True).stdout


def test_our_declaration_is_binary_what_the_official_headers_declared() -> None:
    assert made(lambda: declared(())) == (HERE / "abi.txt").read_text()


def test_official_headers_declare_what_is_written_down(official: tuple[str, ...]) -> None:
    assert made(lambda: declared(official)) == (HERE / "abi.txt").read_text()


def test_a_library_made_with_official_headers_lives_in_a_host_made_with_ours(
    official: tuple[str, ...], harness_program: Path, tmp_path: Path
) -> None:
    node = nodes.linear_node(bias=True)
    command = [str(toolchain.host_compiler()), *FLAGS, "-DDLLMC_HOST", *official]
    toolchain.compiled(command, PLUGINS / "harness.cpp", ".run")  # the other way round it must compile, too
    library = compile_plugins(kernels=kernel_objects(), flags=official)
    with running(harness_program, library) as harness:
        assert harness.create(node.plugin, fields_of(node.attributes)) is None
        _, outputs = harness.live(node.plugin, node.attributes, node.inputs, tmp_path)
    assert (outputs[0] == node.expected[0]).all()
