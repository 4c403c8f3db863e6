"""What the measured code calls: the compiled kernels, the torch references behind the same calls, or both compared."""

import inspect
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from plugins.cuda_library import CudaLibrary
from plugins.head import head
from plugins.int4 import pack_codes, unpack_codes
from plugins.integer_linear import integer_linear
from plugins.quantize import quantize
from plugins.rotate import rotate

Codes = tuple[Tensor, Tensor, Tensor]
Recorded = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]

SMALL_ROWS = 64  # the most that the small path takes


class Kernels(Protocol):
    """The calls of `plugins.cuda_library.CudaLibrary`."""

    @property
    def quantize(self) -> Callable[..., Codes]: ...

    @property
    def linear(self) -> Callable[..., Tensor]: ...

    @property
    def head(self) -> Callable[..., Recorded]: ...

    @property
    def rotate(self) -> Callable[..., Tensor]: ...


def _arguments(method: Callable[..., Any], given: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call of the library but `path`, by name, with the library's defaults."""
    call = inspect.signature(method).bind(None, *given, **named)
    call.apply_defaults()
    return {name: value for name, value in call.arguments.items() if name not in ("self", "path")}


class References:
    """The torch references behind the calls of the library: packed codes, weights in their layout, `path` ignored."""

    def quantize(self, x: Tensor, bits: int = 4, path: str = "auto", **given: Any) -> Codes:
        codes, scale, zero = quantize(x, bits=bits, **given)
        return pack_codes(codes, bits), scale, zero

    def linear(self, *given: Any, **named: Any) -> Tensor:
        arguments = _arguments(CudaLibrary.linear, given, named)
        y_type: torch.dtype = arguments.pop("y_type")
        for name, bits in (("codes", "a_bits"), ("weight", "w_bits")):
            arguments[name] = unpack_codes(arguments[name], arguments[bits])
        return integer_linear(**arguments).to(y_type)

    def head(self, *given: Any, **named: Any) -> Recorded:
        return head(**_arguments(CudaLibrary.head, given, named))

    def rotate(
        self, x: Tensor, blocks: Tensor, perm: Tensor, y_type: torch.dtype = torch.float32, path: str = "auto"
    ) -> Tensor:
        return rotate(x, blocks, perm).to(y_type)
