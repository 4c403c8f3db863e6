"""What the ops ask of a launch at the sizes of LLaDA-8B and Dream-7B: each kernel's dynamic shared memory by target.

The plugin library's own objects run on a CUDA runtime that only writes launches down (cuda/launches.cpp), so every op's
plan and host code is the shipped one. No kernel runs and no GPU is needed.
"""

import ctypes
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from plugins import toolchain
from plugins.cuda_library import PATHS, Device, HeadArgs, Launch, LinearArgs, QuantizeArgs, RotateArgs


@dataclass(frozen=True)
class Gpu:
    """A product of this compute capability: SMs, shared KiB that a block may have, and that an SM has."""

    num_sms: int
    block_kib: int
    sm_kib: int


# From the compute capabilities of the CUDA programming guide; SMs of A100, RTX 3090, Orin, RTX 4090, H100, Thor, 5090.
GPUS = {
    "80": Gpu(108, 163, 164),
    "86": Gpu(82, 99, 100),
    "87": Gpu(16, 163, 164),
    "89": Gpu(128, 99, 100),
    "90a": Gpu(132, 227, 228),
    "110": Gpu(20, 227, 228),
    "120": Gpu(170, 99, 100),
}

ROWS = (1, 8, 16, 32, 64, 128, 1024)
LINEARS = {
    "qkv": ((4096, 12288), (3584, 4608)),
    "o": ((4096, 4096), (3584, 3584)),
    "gate_up": ((4096, 24576), (3584, 37888)),
    "down": ((12288, 4096), (18944, 3584)),
}
FORMATS = ((4, 4), (8, 4), (8, 8))  # bits of activations and of weights
HEADS = ((4096, 126464), (3584, 152064))
TOP_K = 8
FACTORS = {4096: (64, 64), 3584: (56, 64), 12288: (96, 128), 18944: (128, 148)}
TAC_BLOCK = 16
ROTATION_BLOCK = 128
GROUP = 128

TENSOR = 1 << 20  # an aligned address; nothing is read there


def _linears() -> Iterator[ctypes.Structure]:
    shapes = [(name == "gate_up", *shape) for name, both in LINEARS.items() for shape in both]
    for (swiglu, inner, outputs), (a_bits, w_bits), rows, group in product(shapes, FORMATS, ROWS, (0, GROUP)):
        yield LinearArgs(
            rows=rows, inner=inner, outputs=outputs, a_bits=a_bits, w_bits=w_bits, w_group=group, swiglu=swiglu,
            layout=1, codes=TENSOR, scale=TENSOR, weight=TENSOR, w_scale=TENSOR, y=TENSOR,
        )  # fmt: skip


def _heads() -> Iterator[ctypes.Structure]:
    tensors = ["codes", "scale", "weight", "w_scale", "logit_bias", "inv_temp"]
    tensors += ["top_ids", "top_logits", "tail", "neg_entropy", "lse_t"]
    for (inner, vocabulary), rows in product(HEADS, ROWS):
        sizes = {"rows": rows, "rows_per_batch": rows, "inner": inner, "vocabulary": vocabulary, "top_k": TOP_K}
        yield HeadArgs(layout=1, **sizes, **dict.fromkeys(tensors, TENSOR))


def _quantizes() -> Iterator[ctypes.Structure]:
    tensors = dict.fromkeys(("x", "norm_weight", "tac_matrix", "tac_bias", "left", "right", "codes", "scale"), TENSOR)
    several = product(FACTORS, ROWS, (4, 8), (0, GROUP), (0, 1), (False, True), (0, TAC_BLOCK))
    for inner, rows, bits, group, x_type, transform, tac in several:
        left, right = FACTORS[inner] if transform else (0, 0)
        yield QuantizeArgs(
            rows=rows, inner=inner, bits=bits, symmetric=1, a_group=group, clip_lo=1.0, clip_hi=1.0, eps=1e-5,
            left_size=left, right_size=right, tac_block=tac, x_type=x_type, **tensors,
        )  # fmt: skip


def _rotates() -> Iterator[ctypes.Structure]:
    for inner, rows in product(FACTORS, ROWS):
        tensors = dict.fromkeys(("x", "blocks", "perm", "y"), TENSOR)
        yield RotateArgs(rows=rows, inner=inner, block=ROTATION_BLOCK, **tensors)


OPS = {"linear": _linears, "head": _heads, "quantize": _quantizes, "rotate": _rotates}


def recording_library() -> Path:
    """The ops over a runtime that writes launches down. Raises ToolMissingError as `toolchain.build_plugin`."""
    built = toolchain.build_plugin("x86_64").parent
    compiler = str(toolchain.nvcc())
    command = [compiler, f"--options-file={toolchain.NVCC_FLAGS}", f"-I{toolchain.CUDA}", "-c"]
    ours = [toolchain.compiled(command, toolchain.CUDA / name, ".o") for name in ("c_api.cu", "launches.cpp")]
    kernels = [built / f"{source.stem}.o" for source in toolchain.sources() if source.stem != "c_api"]
    link = [str(toolchain.host_compiler()), "-shared", "-Wl,--no-undefined"]
    return toolchain.linked(link, [*kernels, *ours], "dllmc_recording")


def dynamic_shared_bytes(library: Path) -> Mapping[str, Mapping[str, int]]:
    """Target -> mangled kernel -> the most that a launch asks for, on every path that takes one of the sizes.

    A kernel that none of them launches is absent.
    """
    ops = ctypes.CDLL(str(library))
    ops.dllmc_launches.restype = ctypes.c_char_p
    for name in OPS:
        getattr(ops, f"dllmc_{name}").restype = ctypes.c_char_p
    found: dict[str, dict[str, int]] = {}
    for target, gpu in GPUS.items():
        most: dict[str, int] = defaultdict(int)
        device = Device(int(target.rstrip("a")), gpu.num_sms, gpu.block_kib * 1024)
        ops.dllmc_play(device.shared_bytes)
        for (name, cases), path in product(OPS.items(), PATHS.values()):
            launch = Launch(None, TENSOR, device, path)
            for args in cases():
                refused = getattr(ops, f"dllmc_{name}")(ctypes.byref(args), ctypes.byref(launch))
                assert not refused or path != PATHS["auto"], f"{name} on {target}: {refused.decode()}"
        for line in ops.dllmc_launches().decode().splitlines():
            kernel, _, shared = line.split()
            most[kernel] = max(most[kernel], int(shared))
        found[target] = dict(most)
    return found
