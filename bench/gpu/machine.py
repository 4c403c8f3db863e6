"""Where the measurements run: a CUDA device, or a CPU that emulates one for tests and claims nothing."""

import hashlib
import importlib.metadata
import platform
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.gpu.kernels import Kernels
from bench.record import processor
from plugins.cuda_library import CudaLibrary, Device
from plugins.toolchain import ToolMissingError, build_cuda_library, cuda_version

ROOT = Path(__file__).parents[2]
# The plans see an H200 on a CPU as well, so that emulation takes the paths of the machine that is measured.
EMULATED = Device(90, 132, 227 * 1024)
PACKAGES = ("torch", "triton", "numpy")
CLOCKS = ("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.draw", "temperature.gpu")
KERNEL_SOURCES = ("plugins/*.py", "plugins/cuda/*", "plugins/cuda/host/*")
BENCH_SOURCES = ("bench/gpu/*.py",)


OLDEST_ARCH = 80  # the kernels copy to shared memory asynchronously


class UnusableError(RuntimeError):
    """Nothing can be measured on this machine; the message says why in one line."""


def source_hash(*patterns: str) -> str:
    """Of the files that decide a figure."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in patterns for path in ROOT.glob(pattern) if path.is_file()):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A device and the library of kernels built for it; `load` opens the library, poisoned outputs or not."""

    device: torch.device
    emulated: bool
    load: Callable[[bool], Kernels]
    library: Path | None
    compile: bool

    @property
    def arch(self) -> int:
        """Compute capability as two digits."""
        if self.emulated:
            return int(EMULATED.arch)
        major, minor = torch.cuda.get_device_capability(self.device)
        return 10 * major + minor

    def synchronize(self) -> None:
        """Wait until the device has done everything."""
        if not self.emulated:
            torch.cuda.synchronize(self.device)

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function fused by torch's compiler, for fixed shapes."""
        if not self.compile:
            return function
        # One function serves every shape of both models.
        torch._dynamo.config.recompile_limit = 64
        return torch.compile(function, fullgraph=True, dynamic=False)

    def identity(self) -> dict[str, Any]:
        """What two results must share to stand in one file."""
        name = "emulation" if self.emulated else torch.cuda.get_device_name(self.device)
        kernels = source_hash(*KERNEL_SOURCES)
        return {"device": name, "arch": self.arch, "torch": torch.__version__, "kernels": kernels}

    def describe(self) -> dict[str, Any]:
        """Device, versions and clocks, for the file of results."""
        described = {
            **self.identity(),
            "machine": processor(),
            "python": platform.python_version(),
            "versions": {name: _version(name) for name in PACKAGES} | {"cuda": torch.version.cuda, "nvcc": _nvcc()},
            "library": self.library.name if self.library else None,
            "bench": source_hash(*BENCH_SOURCES),
        }
        if not self.emulated:
            properties = torch.cuda.get_device_properties(self.device)
            described |= {"sms": properties.multi_processor_count, "memory_bytes": properties.total_memory}
            described |= {"l2_bytes": properties.L2_cache_size, "driver": _smi("driver_version").get("driver_version")}
        return described

    def clocks(self) -> dict[str, str]:
        """What the driver says of clocks, power and temperature now."""
        return {} if self.emulated else _smi(*CLOCKS)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str:
    program = shutil.which(command[0])
    if program is None:
        return ""
    done = subprocess.run([program, *command[1:]], capture_output=True, text=True, check=False, timeout=60)  # noqa: S603
    return done.stdout.strip() if done.returncode == 0 else ""


def _nvcc() -> str | None:
    try:
        return cuda_version()
    except ToolMissingError:
        return None


def _smi(*fields: str) -> dict[str, str]:
    line = _output("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "-i", "0")
    return dict(zip(fields, (value.strip() for value in line.split(",")), strict=False)) if line else {}


def cuda_machine(library: Path | None) -> Machine:
    """The first CUDA device; builds the library for it unless one is given. Raises UnusableError for an old one."""
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    major, minor = torch.cuda.get_device_capability(device)
    if 10 * major + minor < OLDEST_ARCH:
        name = torch.cuda.get_device_name(device)
        raise UnusableError(f"{name}: got compute capability {major}.{minor}, expected {OLDEST_ARCH / 10} or newer")
    torch.zeros(1, device=device)  # the library works in the context that torch has made
    if library is None:
        library = build_cuda_library(ROOT / "build" / "bench", 10 * major + minor)
    path = library.resolve()
    return Machine(
        device=device,
        emulated=False,
        load=lambda poisoned: CudaLibrary(path, poisoned=poisoned),
        library=path,
        compile=True,
    )


def emulated_machine(library: Path | None, kernels: Kernels | None = None) -> Machine:
    """The CPU, with the host library or with any kernels given; its figures mean nothing."""
    path = library.resolve() if library else None

    def load(poisoned: bool) -> Kernels:
        if kernels is not None:
            return kernels
        assert path is not None, "emulation needs the host library"
        return CudaLibrary(path, EMULATED, poisoned=poisoned)

    return Machine(device=torch.device("cpu"), emulated=True, load=load, library=path, compile=False)
