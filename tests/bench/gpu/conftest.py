"""The GPU measurements on a CPU: with the references behind the kernels' calls, or with the emulated kernels."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from bench.gpu.kernels import References
from bench.gpu.machine import Machine, emulated_machine
from bench.gpu.section import Plan
from plugins import toolchain
from tests.plugins.tools import made


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
    return emulated_machine(made(toolchain.build_host))


@pytest.fixture
def plan(simulated: Machine, tmp_path: Path) -> Callable[..., Plan]:
    """`plan(seconds=60)`: what a user asks for, on the simulated machine."""

    def make(seconds: float = 60.0, methods: tuple[str, ...] = ("star",), every: int = 1) -> Plan:
        deadline = time.monotonic() + seconds
        return Plan(machine=simulated, work=tmp_path, seed=7, deadline=deadline, methods=methods, every=every)

    return make
