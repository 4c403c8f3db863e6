"""The compilers of the kernels: where they are, their flags, and libraries made once per content of their sources.

Every object is kept under a name that hashes its flags and all the files it includes, so that only what changed is
compiled again, and processes that build at once share the work.
"""

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

CUDA = Path(__file__).parent / "cuda"
BUILD = Path(__file__).parents[1] / "build" / "kernels"
TOOLS = Path(__file__).parents[1] / "build" / "tools"

HOST_FLAGS, NVCC_FLAGS = CUDA / "host.flags", CUDA / "nvcc.flags"


class ToolMissingError(RuntimeError):
    """A program that a build needs is not on this machine; the message names it."""


def _program(name: str, what: str) -> Path:
    found = shutil.which(name)
    if not found:
        raise ToolMissingError(f"no {what} ({name})")
    return Path(found)


def host_compiler() -> Path:
    """The C++ compiler: $CXX or g++."""
    return _program(os.environ.get("CXX", "g++"), "C++ compiler")


def aarch64_compiler() -> Path:
    return _program("aarch64-linux-gnu-g++", "C++ compiler for aarch64")


def aarch64_emulator() -> list[str]:
    """Words to put before the command line of an aarch64 program that `aarch64_compiler` made."""
    return [str(_program("qemu-aarch64", "emulator of aarch64")), "-L", "/usr/aarch64-linux-gnu"]


def _folders_of_wheels() -> list[Path]:
    """Where wheels of CUDA tools may stand: what `make tools` fetched, and the folders that Python imports from."""
    return [TOOLS / "cuda" / "nvidia", *(Path(folder) / "nvidia" for folder in sys.path if folder)]


def cuda_program(name: str) -> Path:
    """A program of the CUDA toolkit (nvcc, nvdisasm, cuobjdump): of $CUDA_HOME, else of $PATH, else of a wheel."""
    places = [Path(os.environ["CUDA_HOME"]) / "bin"] if os.environ.get("CUDA_HOME") else []
    places += [Path(folder) for folder in os.environ.get("PATH", "").split(os.pathsep)]
    places += [bin for folder in _folders_of_wheels() for bin in sorted(folder.glob("cu*/bin"))]
    places += [Path("/usr/local/cuda/bin")]
    found = next((place / name for place in places if os.access(place / name, os.X_OK)), None)
    if found is None:
        raise ToolMissingError(f"no CUDA program {name}")
    return found


def fetched(name: str) -> Path:
    """A file or folder among what `make tools` fetched: runtimes that only tests load, libraries of other machines."""
    if not (TOOLS / name).exists():
        raise ToolMissingError(f"no {name} in {TOOLS.relative_to(TOOLS.parents[1])} (make tools)")
    return TOOLS / name


def nvcc() -> Path:
    return cuda_program("nvcc")


def cmake() -> Path:
    return _program("cmake", "CMake")


def cuda_version() -> str:
    """nvcc's version, like "13.0.88"."""
    text = subprocess.run([nvcc(), "--version"], capture_output=True, text=True, check=True).stdout  # noqa: S603
    return re.search(r"V(\d+\.\d+\.\d+)", text)[1]  # type: ignore[index]


def jobs() -> int:
    """How many compilers of kernels run at once; each takes gigabytes, so few but on machines with many processors."""
    return max(2, (os.cpu_count() or 1) // 4)


def sources() -> list[Path]:
    """The kernels' translation units."""
    return sorted(CUDA.glob("*.cu"))


def _includes(source: Path, folders: Sequence[Path], seen: set[Path]) -> set[Path]:
    """`source` and every file of ours that it includes from its own folder or from `folders`."""
    if source not in seen:
        seen.add(source)
        for name in re.findall(r'^\s*#\s*include "([^"]+)"', source.read_text(), re.MULTILINE):
            found = next((folder / name for folder in (source.parent, *folders) if (folder / name).exists()), None)
            if found:
                _includes(found.resolve(), folders, seen)
    return seen


def _named_in(command: Sequence[str]) -> set[Path]:
    """Files that the options of a command name, like --options-file=FILE, @FILE or -Wl,--version-script=FILE."""
    words = {part for word in command[1:] for part in re.split("[=,@]", word)}
    return {Path(word) for word in words if word and Path(word).is_file()}


def _digest(command: Sequence[str], files: Iterable[Path]) -> str:
    digest = hashlib.sha256("\0".join(command).encode())
    for file in sorted({*files, *_named_in(command)}):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Held by one process at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _check(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def _run(command: Sequence[str], output: Path) -> None:
    """Run a compiler that writes `output`, which appears whole or not at all. Raises RuntimeError: what it printed."""
    part = output.with_name(f"{output.name}.{os.getpid()}")
    _check([*command, "-o", str(part)])
    part.replace(output)


def compiled(command: Sequence[str], source: Path, suffix: str, folder: Path = BUILD) -> Path:
    """`source` compiled by `command` (compiler and flags), taken from `folder` where it was made before."""
    folders = [Path(word[2:]) for word in command if word.startswith("-I")]
    digest = _digest(command, _includes(source.resolve(), folders, set()))
    output = folder / "objects" / f"{source.stem}-{digest}{suffix}"
    with locked(output.with_suffix(".lock")):
        if not output.exists():
            _run([*command, str(source)], output)
    return output


def linked(command: Sequence[str], objects: Sequence[Path], name: str, folder: Path = BUILD) -> Path:
    """The library `name` of `objects`, taken from `folder` where it was made before."""
    output = folder / f"lib{name}-{_digest(command, objects)}.so"
    with locked(output.with_suffix(".lock")):
        if not output.exists():
            _run([*command, *map(str, objects)], output)
    return output


def build_host(folder: Path = BUILD) -> Path:
    """The kernels as a library of host C++. Raises ToolMissingError without a compiler, RuntimeError if one fails."""
    compiler = str(host_compiler())
    command = [compiler, f"@{HOST_FLAGS}", f"-I{CUDA}", "-c"]
    objects = [compiled(command, source, ".o", folder) for source in sources()]
    link = [compiler, "-shared", "-Wl,--no-undefined", "-fsanitize=alignment,bounds"]
    return linked(link, objects, "dllmc_host", folder)


def build_plugin(machine: str, folder: Path = BUILD.parent / "plugins") -> Path:
    """libdllmc_tensorrt.so by CMake, for GPUs beside an x86_64 or an aarch64 CPU.

    Raises ToolMissingError without CMake, compilers, nvcc or the cudart of the target; RuntimeError if one fails.
    """
    options = [f"-DDLLMC_CUDA={nvcc().parents[1]}", *(["-G", "Ninja"] if shutil.which("ninja") else [])]
    aarch64_compiler() if machine == "aarch64" else host_compiler()
    if machine == "aarch64":
        cudart = fetched("aarch64/nvidia/cu13/lib/libcudart_static.a").parent
        options += [f"-DCMAKE_TOOLCHAIN_FILE={CUDA.parent}/aarch64.cmake", f"-DDLLMC_CUDART={cudart}"]
    output = folder / machine
    with locked(folder / f"{machine}.lock"):
        _check([str(cmake()), "-S", str(CUDA.parent), "-B", str(output), "-DCMAKE_BUILD_TYPE=Release", *options])
        _check([str(cmake()), "--build", str(output), "--parallel", str(jobs())])
    return output / "libdllmc_tensorrt.so"


def build_program(source: Path, compiler: Path, folder: Path = BUILD) -> Path:
    """A program of one C++ file that runs kernels on the CPU."""
    return compiled([str(compiler), f"@{HOST_FLAGS}", f"-I{CUDA}"], source, ".run", folder)


def build_cuda_library(folder: Path, arch: int) -> Path:
    """The kernels as a CUDA library for GPUs of one compute capability (80, 90, ...); needs nvcc only."""
    name = f"{arch}a" if arch == 90 else str(arch)  # wgmma is of 90a alone
    compiler = str(nvcc())
    command = [compiler, f"--options-file={NVCC_FLAGS}", f"-gencode=arch=compute_{name},code=sm_{name}", f"-I{CUDA}"]
    with ThreadPoolExecutor(jobs()) as pool:
        objects = list(pool.map(lambda source: compiled([*command, "-c"], source, ".o", folder), sources()))
    home = Path(compiler).resolve().parents[1]  # wheels keep libraries in lib, toolkits in lib64
    link = [compiler, "-shared", "-cudart=static", f"-L{home / 'lib'}", f"-L{home / 'lib64'}"]
    return linked(link, objects, f"dllmc_cuda_{name}", folder)
