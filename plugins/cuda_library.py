"""The compiled kernels as functions over torch tensors: what tests and benchmarks call; TensorRT has its own plugins.

One class over two builds of the same source: the CUDA library on a GPU, the host library on a CPU. Codes of at most
4 bits are packed here (`int4.pack_int4`), weights stand in the bytes of their `layout` (`layout.to_layout`).
Shape letters: M rows, K inner, N outputs, G groups, B batch, R head rows, V vocabulary.
"""

import ctypes
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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


def _pointer(tensor: Tensor | None) -> int | None:
    if tensor is None:
        return None
    assert tensor.is_contiguous(), "kernels read contiguous tensors"
    return tensor.data_ptr()


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

    def _run(self, name: str, args: ctypes.Structure, like: Tensor, path: str) -> None:
        device = self.device
        stream = torch.cuda.current_stream().cuda_stream if like.is_cuda else 0
        size = getattr(self._library, f"dllmc_{name}_workspace")(ctypes.byref(args), ctypes.byref(device))
        workspace = torch.empty(size, dtype=torch.uint8, device=like.device) if size else None
        launch = Launch(stream, _pointer(workspace), device, PATHS[path])
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
        *lead, inner = x.shape
        codes = self._output((*lead, inner // 2 if bits <= 4 else inner), 0x55, torch.int8, x)
        groups = inner // a_group if a_group else 1
        scale = self._output((*lead, groups), torch.nan, torch.float32, x)
        zero = self._output((0,) if symmetric else (*lead, groups), 2**30, torch.int32, x)
        args = QuantizeArgs(
            rows=x.numel() // inner, inner=inner, bits=bits, symmetric=symmetric, a_group=a_group,
            clip_lo=clip_lo, clip_hi=clip_hi, eps=eps, gate_axis=gate_axis, gate_size=gate_size,
            left_size=0 if left is None else left.shape[0], right_size=0 if right is None else right.shape[0],
            tac_block=0 if tac_matrix is None else tac_matrix.shape[-1], x_type=TYPES[x.dtype], x=_pointer(x),
            norm_weight=_pointer(norm_weight), channel_scale=_pointer(channel_scale),
            tac_matrix=_pointer(tac_matrix), tac_bias=_pointer(tac_bias), left=_pointer(left), right=_pointer(right),
            state=_pointer(state), codes=_pointer(codes), scale=_pointer(scale),
            zero=None if symmetric else _pointer(zero),
        )  # fmt: skip
        self._run("quantize", args, x, path)
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
        *lead, _ = codes.shape
        outputs = weight.shape[0]
        inner = weight.shape[1] * (2 if w_bits <= 4 else 1)
        y = self._output((*lead, outputs // 2 if swiglu else outputs), torch.nan, y_type, codes)
        args = LinearArgs(
            rows=scale.numel() // scale.shape[-1], inner=inner, outputs=outputs, a_bits=a_bits, w_bits=w_bits,
            a_group=a_group, w_group=w_group, swiglu=swiglu, layout=layout, y_type=TYPES[y_type],
            residual_type=0 if residual is None else TYPES[residual.dtype], codes=_pointer(codes),
            scale=_pointer(scale), zero=_pointer(zero), weight=_pointer(weight), w_scale=_pointer(w_scale),
            w_sum=_pointer(w_sum), bias=_pointer(bias), residual=_pointer(residual), y=_pointer(y),
        )  # fmt: skip
        self._run("linear", args, codes, path)
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
        batch, rows, inner = codes.shape
        top_ids = self._output((batch, rows, top_k), -1, torch.int64, codes)
        shapes = ((batch, rows, top_k), *3 * ((batch, rows),))
        floats = [self._output(shape, torch.nan, torch.float32, codes) for shape in shapes]
        args = HeadArgs(
            rows=batch * rows, rows_per_batch=rows, inner=inner, vocabulary=weight.shape[0], top_k=top_k,
            layout=layout, codes=_pointer(codes), scale=_pointer(scale), weight=_pointer(weight),
            w_scale=_pointer(w_scale), logit_bias=_pointer(logit_bias), inv_temp=_pointer(inv_temp),
            top_ids=_pointer(top_ids), top_logits=_pointer(floats[0]), tail=_pointer(floats[1]),
            neg_entropy=_pointer(floats[2]), lse_t=_pointer(floats[3]),
        )  # fmt: skip
        self._run("head", args, codes, path)
        return top_ids, floats[0], floats[1], floats[2], floats[3]

    def rotate(
        self, x: Tensor, blocks: Tensor, perm: Tensor, y_type: torch.dtype = torch.float32, path: str = "auto"
    ) -> Tensor:
        """`rotate.rotate`. Raises ValueError: the reason."""
        y = self._output(tuple(x.shape), torch.nan, y_type, x)
        inner = x.shape[-1]
        args = RotateArgs(
            rows=x.numel() // inner, inner=inner, block=blocks.shape[-1], x_type=TYPES[x.dtype], y_type=TYPES[y_type],
            x=_pointer(x), blocks=_pointer(blocks), perm=_pointer(perm), y=_pointer(y),
        )  # fmt: skip
        self._run("rotate", args, x, path)
        return y


def check_reason(library: CudaLibrary, name: str, **fields: Any) -> str | None:
    """What an op's check() says of a structure with these fields and zeros elsewhere."""
    reason = getattr(library._library, f"dllmc_{name}_check")(ctypes.byref(_ARGS[name](**fields)))
    return reason.decode() if reason else None
