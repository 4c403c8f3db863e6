"""The two models side by side on one device, and the memory each of them takes."""

import gc
from collections.abc import Callable

import torch

from bench.gpu.machine import Machine
from bench.gpu.shapes import ModelShape

SPARE_BYTES = 3 * 2**30


class DoesNotFitError(RuntimeError):
    """Both models together need more memory than the device has free."""


def make_room(machine: Machine, shape: ModelShape) -> None:
    """Free what earlier measurements left. Raises DoesNotFitError where both models of a shape do not fit at once."""
    gc.collect()
    if machine.emulated:
        return
    torch.cuda.empty_cache()
    # cuBLAS takes its workspace at the first product; it is nobody's weights or activations.
    x = torch.ones(64, 64, dtype=torch.bfloat16, device=machine.device)
    torch.mm(x, x)
    weights = shape.layers * shape.block_weights + 2 * shape.vocabulary * shape.hidden
    needed, free = int(2.6 * weights) + SPARE_BYTES, torch.cuda.mem_get_info()[0]
    if needed > free:
        raise DoesNotFitError(f"{shape.name} in both forms needs {needed >> 20} MiB; {free >> 20} MiB are free")


def allocated_bytes(machine: Machine) -> int:
    """What torch has handed out on the device; 0 without one."""
    return 0 if machine.emulated else torch.cuda.memory_allocated(machine.device)


def peak_bytes(machine: Machine, base_bytes: int, run: Callable[[], object]) -> int:
    """Most memory above `base_bytes` while `run` ran, what is kept included; 0 without a device."""
    run()  # compiles, and takes what is taken once
    machine.synchronize()
    if machine.emulated:
        return 0
    torch.cuda.reset_peak_memory_stats(machine.device)
    run()
    machine.synchronize()
    return torch.cuda.max_memory_allocated(machine.device) - base_bytes
