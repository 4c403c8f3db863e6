"""The options of plugins/CMakeLists.txt: what a build is made for, and what is refused before it starts."""

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from plugins import toolchain
from tests.plugins.tools import made

Done = subprocess.CompletedProcess[str]
Configure = Callable[..., Done]
AARCH64 = "-DCMAKE_TOOLCHAIN_FILE=aarch64.cmake"


@pytest.fixture
def configure(tmp_path: Path) -> Configure:
    """Call with options; the build folder is tmp_path."""
    cmake, home, compiler = made(toolchain.cmake), made(toolchain.nvcc).parents[1], made(toolchain.host_compiler)

    def run(*options: str) -> Done:
        chosen = [] if AARCH64 in options else [f"-DCMAKE_CXX_COMPILER={compiler}"]
        command = [cmake, "-S", toolchain.CUDA.parent, "-B", tmp_path, f"-DDLLMC_CUDA={home}", *chosen, *options]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    return run


def targets(build: Path) -> set[str]:
    """What nvcc is asked for, like sm_80."""
    text = "".join(path.read_text() for name in ("build.ninja", "build.make") for path in build.rglob(name))
    return set(re.findall(r"-gencode=\S*code=(\w+)", text))


def flat(done: Done) -> str:
    """CMake's message without its line breaks."""
    assert done.returncode, done.stdout
    return " ".join(done.stderr.split())


def test_hopper_is_built_with_its_own_instructions(configure: Configure, tmp_path: Path) -> None:
    done = configure("-DDLLMC_GPUS=80;90")
    assert done.returncode == 0, done.stderr
    assert targets(tmp_path) == {"sm_80", "sm_90a"}


@pytest.mark.parametrize("wrong", ["75", "sm_80", "80a", "90b", "8", "ptx"])
def test_a_target_is_a_compute_capability(wrong: str, configure: Configure) -> None:
    assert f"DLLMC_GPUS: got {wrong}, expected compute capabilities" in flat(configure(f"-DDLLMC_GPUS=80;{wrong}"))


def test_ptx_does_not_stand_in_for_hopper(configure: Configure, tmp_path: Path) -> None:
    assert "got PTX without 90a" in flat(configure("-DDLLMC_GPUS=80;PTX"))
    assert configure("-DDLLMC_GPUS=90;PTX").returncode == 0
    assert targets(tmp_path) == {"sm_90a", "compute_90"}


def test_a_cross_build_takes_no_library_of_this_machine(configure: Configure, tmp_path: Path) -> None:
    made(toolchain.aarch64_compiler)
    assert "DLLMC_CUDART: got '', expected the folder of libcudart_static.a for aarch64" in flat(configure(AARCH64))
    (tmp_path / "libcudart_static.a").touch()
    done = configure(AARCH64, f"-DDLLMC_CUDART={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert targets(tmp_path) == {"sm_87", "sm_110"}


def test_official_headers_bring_cuda_headers_along(configure: Configure, tmp_path: Path) -> None:
    options = ("-DDLLMC_HOST=ON", f"-DDLLMC_TENSORRT_HEADERS={tmp_path}", "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON")
    assert f"got {tmp_path}, expected the folder of NvInferRuntime.h" in flat(configure(*options))
    (tmp_path / "NvInferRuntime.h").touch()
    done = configure(*options)
    assert done.returncode == 0, done.stderr
    folders = re.findall(r"-isystem (\S+)", (tmp_path / "compile_commands.json").read_text())
    assert any((Path(folder) / "cuda_runtime_api.h").exists() for folder in folders), folders
