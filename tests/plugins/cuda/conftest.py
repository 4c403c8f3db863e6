"""The kernels as a library of host C++, compiled once for all tests; without a compiler these tests skip by name."""

from collections.abc import Callable
from pathlib import Path
from zlib import crc32

import pytest

from plugins import toolchain
from plugins.cuda_library import CudaLibrary, Device
from tests.plugins.tools import made

Kernels = Callable[..., CudaLibrary]

# Shared memory that a block may opt in to, by compute capability.
SHARED_BYTES = {80: 166912, 86: 101376, 87: 166912, 89: 101376, 90: 232448, 110: 232448, 120: 101376}


@pytest.fixture(autouse=True)
def order_of_threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every other test starts with a block whose threads run from last to first: a missing barrier shows."""
    if "kernels" in request.fixturenames and crc32(request.node.nodeid.encode()) % 2:
        monkeypatch.setenv("DLLMC_HOST_REVERSE", "1")


@pytest.fixture(scope="session")
def host_library() -> Path:
    return made(toolchain.build_host)


@pytest.fixture(scope="session")
def kernels(host_library: Path) -> Kernels:
    """`kernels(arch=80, num_sms=4)`: the kernels as they would run on a GPU of that compute capability."""

    def on(arch: int = 80, num_sms: int = 4) -> CudaLibrary:
        return CudaLibrary(host_library, Device(arch, num_sms, SHARED_BYTES[arch]))

    return on
