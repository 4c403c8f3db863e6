"""The GPU measurements on a CPU: with the references behind the kernels' calls, or with the emulated kernels."""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from bench.gpu.kernels import References
from bench.gpu.machine import Machine, emulated_machine
from bench.gpu.section import Plan
from plugins import toolchain


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def simulated() -> Machine:
    """A machine whose kernels are the references."""
    return emulated_machine(None, References())


@pytest.fixture(scope="session")
def emulated() -> Machine:
    """A machine whose kernels are the host build; skips by name without a compiler."""
    try:
        return emulated_machine(toolchain.build_host())
    except toolchain.ToolMissingError as missing:
        if os.environ.get("DLLMC_REQUIRE_TOOLS"):
            pytest.fail(str(missing))
        pytest.skip(str(missing))


@pytest.fixture
def plan(simulated: Machine, tmp_path: Path) -> Callable[..., Plan]:
    """`plan(seconds=60)`: what a user asks for, on the simulated machine."""

    def make(seconds: float = 60.0, methods: tuple[str, ...] = ("star",), every: int = 1) -> Plan:
        deadline = time.monotonic() + seconds
        return Plan(machine=simulated, work=tmp_path, seed=7, deadline=deadline, methods=methods, every=every)

    return make
