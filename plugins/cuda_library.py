"""The compiled kernels as functions over torch tensors: what tests and benchmarks call; TensorRT has its own plugins.

One class over two builds of the same source: the CUDA library on a GPU, the host library on a CPU. Codes of at most
4 bits are packed here (`int4.pack_int4`), weights stand in the bytes of their `layout` (`layout.to_layout`).
Shape letters: M rows, K inner, N outputs, G groups, B batch, R head rows, V vocabulary.
"""

import ctypes
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plugins.int4 import codes_per_byte
from plugins.record import OUTPUTS

PATHS = {name: i for i, name in enumerate(("auto", "naive", "rows", "tile", "exact", "small", "large", "hopper"))}
TYPES = {torch.float32: 0, torch.float16: 1}
_I64, _I32, _F32, _PTR = ctypes.c_int64, ctypes.c_int32, ctypes.c_float, ctypes.c_void_p


class Device(ctypes.Structure):
    """What a kernel's plan asks of a device: args.h."""

    _fields_ = (("arch", _I32), ("num_sms", _I32), ("shared_bytes", _I32))


class Launch(ctypes.Structure):
    """Where and how an op runs: args.h."""

    _fields_ = (("stream", _PTR), ("workspace", _PTR), ("device", Device), ("path", _I32))


def _structure(name: str, fields: str) -> type[ctypes.Structure]:
    """From "type name name; type name": the structure of the same name in args.h."""
    types = {"i64": _I64, "i32": _I32, "f32": _F32, "ptr": _PTR}
    pairs = [(word, types[kind]) for part in fields.split(";") for kind, *words in [part.split()] for word in words]
    return type(name, (ctypes.Structure,), {"_fields_": pairs})


QuantizeArgs = _structure(
    "QuantizeArgs",
    "i64 rows; i32 inner bits symmetric a_group; f32 clip_lo clip_hi eps; i32 gate_axis gate_size left_size right_size"
    " tac_block x_type; ptr x norm_weight channel_scale tac_matrix tac_bias left right state codes scale zero",
)
LinearArgs = _structure(
    "LinearArgs",
    "i64 rows; i32 inner outputs a_bits w_bits a_group w_group swiglu layout y_type residual_type;"
    " ptr codes scale zero weight w_scale w_sum bias residual y",
)
HeadArgs = _structure(
    "HeadArgs",
    "i64 rows; i32 rows_per_batch inner vocabulary top_k layout;"
    " ptr codes scale weight w_scale logit_bias inv_temp top_ids top_logits tail neg_entropy lse_t",
)
RotateArgs = _structure("RotateArgs", "i64 rows; i32 inner block x_type y_type; ptr x blocks perm y")
_ARGS = {"quantize": QuantizeArgs, "linear": LinearArgs, "head": HeadArgs, "rotate": RotateArgs}


# Input -> tensor, shape (a number: so many values in any shape), types that the kernel reads.
_Inputs = Mapping[str, tuple[Tensor | None, tuple[int, ...] | int, tuple[torch.dtype, ...]]]
_FLOATING, _FLOAT, _BYTES = tuple(TYPES), (torch.float32,), (torch.int8,)
_INT32, _INT64 = (torch.int32,), (torch.int64,)


def _names(types: tuple[torch.dtype, ...]) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in types)


def _mismatch(
    tensor: Tensor, shape: tuple[int, ...] | int, types: tuple[torch.dtype, ...], device: torch.device
) -> str | None:
    """Why a kernel would read this tensor wrongly, "got X, expected Y"."""
    if tensor.dtype not in types:
        return f"got {_names((tensor.dtype,))}, expected {_names(types)}"
    if isinstance(shape, int):
        if tensor.numel() != shape:
            return f"got {tensor.numel()} values, expected {shape}"
    elif tensor.shape != shape:
        return f"got shape {list(tensor.shape)}, expected {list(shape)}"
    if tensor.device != device:
        return f"got {tensor.device}, expected {device}"
    return None if tensor.is_contiguous() else f"got strides {list(tensor.stride())}, expected contiguous"


def _pointers(inputs: _Inputs, device: torch.device) -> dict[str, int | None]:
    """Addresses by name, None for what is absent. Raises ValueError: the first tensor that does not fit."""
    pointers: dict[str, int | None] = {}
    for name, (tensor, shape, types) in inputs.items():
        if tensor is not None and (reason := _mismatch(tensor, shape, types, device)):
            raise ValueError(f"{name}: {reason}")
        pointers[name] = None if tensor is None else tensor.data_ptr()
    return pointers


def _axes(name: str, tensor: Tensor, count: int) -> tuple[int, ...]:
    """The shape of a tensor of so many axes. Raises ValueError for another number of axes."""
    if tensor.ndim != count:
        raise ValueError(f"{name}: got {tensor.ndim} axes, expected {count}")
    return tuple(tensor.shape)


def _rows(name: str, tensor: Tensor) -> tuple[tuple[int, ...], int]:
    """Leading axes and the size of the last. Raises ValueError for a tensor without axes."""
    if not tensor.ndim:
        raise ValueError(f"{name}: got 0 axes, expected at least 1")
    return tuple(tensor.shape[:-1]), tensor.shape[-1]


def _last(tensor: Tensor | None) -> int:
    return tensor.shape[-1] if tensor is not None and tensor.ndim else 0


def _groups(inner: int, *sizes: int) -> int:
    """Groups of the first size that is not 0. Sizes that there cannot be are refused by the kernel's check."""
    return next((inner // size for size in sizes if size > 0), 1)


def _type(name: str, dtype: torch.dtype) -> int:
    if dtype not in TYPES:
        raise ValueError(f"{name}: got {_names((dtype,))}, expected {_names(_FLOATING)}")
    return TYPES[dtype]


class CudaLibrary:
    """A loaded library of kernels; `device` overrides what the plans are told (the host build can play any).

    `poisoned` outputs are filled first, so that what a kernel leaves unwritten shows; for timing they are not.
    """

    def __init__(self, path: Path, device: Device | None = None, poisoned: bool = True) -> None:
        self.poisoned = poisoned
        self._library = ctypes.CDLL(str(path))
        for name, structure in _ARGS.items():
            for suffix in ("", "_check"):
                getattr(self._library, f"dllmc_{name}{suffix}").restype = ctypes.c_char_p
            for suffix in ("_workspace", "_size"):
                getattr(self._library, f"dllmc_{name}{suffix}").restype = ctypes.c_size_t
            size = getattr(self._library, f"dllmc_{name}_size")()
            assert size == ctypes.sizeof(structure), f"{name}: the library was built from another args.h"
        self._library.dllmc_device.restype = ctypes.c_char_p
        self.device = device or self._ask_device()

    def _ask_device(self) -> Device:
        device = Device()
        if reason := self._library.dllmc_device(ctypes.byref(device)):
            raise ValueError(reason.decode())
        return device

    def _output(self, shape: tuple[int, ...], fill: float, dtype: torch.dtype, like: Tensor) -> Tensor:
        empty = torch.empty(shape, dtype=dtype, device=like.device)
        return empty.fill_(fill) if self.poisoned else empty

    def _check(self, name: str, args: ctypes.Structure, path: str) -> None:
        """Raise ValueError for numbers that the op refuses, before outputs take their sizes from them."""
        if path not in PATHS:
            raise ValueError(f"path: got {path}, expected {', '.join(PATHS)}")
        if reason := getattr(self._library, f"dllmc_{name}_check")(ctypes.byref(args)):
            raise ValueError(reason.decode())

    def _run(self, name: str, args: ctypes.Structure, outputs: Mapping[str, Tensor], path: str) -> None:
        for field, tensor in outputs.items():
            setattr(args, field, tensor.data_ptr())
        device, where = self.device, next(iter(outputs.values())).device
        stream = torch.cuda.current_stream().cuda_stream if where.type == "cuda" else 0
        size = getattr(self._library, f"dllmc_{name}_workspace")(ctypes.byref(args), ctypes.byref(device))
        workspace = torch.empty(size, dtype=torch.uint8, device=where)
        launch = Launch(stream, workspace.data_ptr(), device, PATHS[path])
        if reason := getattr(self._library, f"dllmc_{name}")(ctypes.byref(args), ctypes.byref(launch)):
            raise ValueError(reason.decode())

    def quantize(
        self,
        x: Tensor,
        norm_weight: Tensor | None = None,
        channel_scale: Tensor | None = None,
        tac_matrix: Tensor | None = None,
        tac_bias: Tensor | None = None,
        left: Tensor | None = None,
        right: Tensor | None = None,
        state: Tensor | None = None,
        bits: int = 4,
        symmetric: bool = True,
        a_group: int = 0,
        clip_lo: float = 1.0,
        clip_hi: float = 1.0,
        eps: float = 1e-5,
        gate_axis: int = 0,
        gate_size: int = 0,
        path: str = "auto",
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`quantize.quantize` with codes packed: int8 [..., K/2] for at most 4 bits. Raises ValueError: the reason."""
        lead, inner = _rows("x", x)
        a, b, g = _last(left), _last(right), _last(tac_matrix)
        inputs: _Inputs = {
            "x": (x, (*lead, inner), _FLOATING),
            "norm_weight": (norm_weight, (inner,), _FLOAT),
            "channel_scale": (channel_scale, (inner,), _FLOAT),
            "tac_matrix": (tac_matrix, (_groups(inner, g), g, g), _FLOAT),
            "tac_bias": (tac_bias, (inner,), _FLOAT),
            "left": (left, (a, a), _FLOAT),
            "right": (right, (b, b), _FLOAT),
            "state": (state, math.prod(lead), _INT32),
        }
        pointers = _pointers(inputs, x.device)
        args = QuantizeArgs(
            rows=math.prod(lead), inner=inner, bits=bits, symmetric=symmetric, a_group=a_group, clip_lo=clip_lo,
            clip_hi=clip_hi, eps=eps, gate_axis=gate_axis, gate_size=gate_size, left_size=a, right_size=b, tac_block=g,
            x_type=TYPES[x.dtype], **pointers,
        )  # fmt: skip
        self._check("quantize", args, path)
        grid = (*lead, _groups(inner, a_group))
        codes = self._output((*lead, inner // codes_per_byte(bits)), 0x55, torch.int8, x)
        scale = self._output(grid, torch.nan, torch.float32, x)
        zero = self._output((0,) if symmetric else grid, 2**30, torch.int32, x)
        self._run("quantize", args, {"codes": codes, "scale": scale, "zero": zero}, path)
        return codes, scale, zero

    def linear(
        self,
        codes: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        weight: Tensor,
        w_scale: Tensor,
        w_sum: Tensor | None = None,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
        a_bits: int = 4,
        w_bits: int = 4,
        a_group: int = 0,
        w_group: int = 0,
        swiglu: bool = False,
        layout: int = 1,
        y_type: torch.dtype = torch.float32,
        path: str = "auto",
    ) -> Tensor:
        """`integer_linear.integer_linear` on packed codes and weights in `layout`. Raises ValueError: the reason."""
        lead, _ = _rows("codes", codes)
        outputs, columns = _axes("weight", weight, 2)
        inner = columns * codes_per_byte(w_bits)
        grid, tables = (*lead, _groups(inner, a_group)), (outputs, _groups(inner, w_group))
        inputs: _Inputs = {
            "codes": (codes, (*lead, inner // codes_per_byte(a_bits)), _BYTES),
            "scale": (scale, grid, _FLOAT),
            "zero": (zero, grid, _INT32),
            "weight": (weight, (outputs, columns), _BYTES),
            "w_scale": (w_scale, tables, _FLOAT),
            "w_sum": (w_sum, (outputs, _groups(inner, a_group, w_group)), _INT32),
            "bias": (bias, (outputs,), _FLOAT),
            "residual": (residual, (*lead, outputs), _FLOATING),
        }
        pointers = _pointers(inputs, codes.device)
        args = LinearArgs(
            rows=math.prod(lead), inner=inner, outputs=outputs, a_bits=a_bits, w_bits=w_bits, a_group=a_group,
            w_group=w_group, swiglu=swiglu, layout=layout, y_type=_type("y_type", y_type),
            residual_type=0 if residual is None else TYPES[residual.dtype], **pointers,
        )  # fmt: skip
        self._check("linear", args, path)
        y = self._output((*lead, outputs // 2 if swiglu else outputs), torch.nan, y_type, codes)
        self._run("linear", args, {"y": y}, path)
        return y

    def head(
        self,
        codes: Tensor,
        scale: Tensor,
        weight: Tensor,
        w_scale: Tensor,
        logit_bias: Tensor,
        inv_temp: Tensor,
        top_k: int,
        layout: int = 1,
        path: str = "auto",
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """`head.head` on weights in `layout`. Raises ValueError: the reason."""
        batch, rows, inner = _axes("codes", codes, 3)
        vocabulary = _axes("weight", weight, 2)[0]
        inputs: _Inputs = {
            "codes": (codes, (batch, rows, inner), _BYTES),
            "scale": (scale, (batch, rows, 1), _FLOAT),
            "weight": (weight, (vocabulary, inner), _BYTES),
            "w_scale": (w_scale, (vocabulary, 1), _FLOAT),
            "logit_bias": (logit_bias, (vocabulary,), _FLOAT),
            "inv_temp": (inv_temp, (batch,), _FLOAT),
        }
        pointers = _pointers(inputs, codes.device)
        args = HeadArgs(
            rows=batch * rows, rows_per_batch=rows, inner=inner, vocabulary=vocabulary, top_k=top_k, layout=layout,
            **pointers,
        )  # fmt: skip
        self._check("head", args, path)
        top_ids = self._output((batch, rows, top_k), -1, torch.int64, codes)
        shapes = ((batch, rows, top_k), *3 * ((batch, rows),))
        floats = [self._output(shape, torch.nan, torch.float32, codes) for shape in shapes]
        record = (top_ids, floats[0], floats[1], floats[2], floats[3])
        self._run("head", args, dict(zip(OUTPUTS, record, strict=True)), path)
        return record

    def rotate(
        self, x: Tensor, blocks: Tensor, perm: Tensor, y_type: torch.dtype = torch.float32, path: str = "auto"
    ) -> Tensor:
        """`rotate.rotate`. Raises ValueError: the reason."""
        lead, inner = _rows("x", x)
        block = _last(blocks)
        inputs: _Inputs = {
            "x": (x, (*lead, inner), _FLOATING),
            "blocks": (blocks, (_groups(inner, block), block, block), _FLOAT),
            "perm": (perm, (inner,), _INT64),
        }
        pointers = _pointers(inputs, x.device)
        args = RotateArgs(
            rows=math.prod(lead), inner=inner, block=block, x_type=TYPES[x.dtype], y_type=_type("y_type", y_type),
            **pointers,
        )  # fmt: skip
        self._check("rotate", args, path)
        y = self._output((*lead, inner), torch.nan, y_type, x)
        self._run("rotate", args, {"y": y}, path)
        return y


def check_reason(library: CudaLibrary, name: str, **fields: Any) -> str | None:
    """What an op's check() says of a structure with these fields and zeros elsewhere."""
    reason = getattr(library._library, f"dllmc_{name}_check")(ctypes.byref(_ARGS[name](**fields)))
    return reason.decode() if reason else None
