"""What the measured code calls: the compiled kernels, the torch references behind the same calls, or both compared."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from plugins.head import head
from plugins.int4 import pack_int4, unpack_int4
from plugins.integer_linear import integer_linear
from plugins.quantize import quantize
from plugins.rotate import rotate

Codes = tuple[Tensor, Tensor, Tensor]
Recorded = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


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


def _wide(packed: Tensor, bits: int) -> Tensor:
    return unpack_int4(packed.view(torch.uint8)) if bits <= 4 else packed


class References:
    """The torch references behind the calls of the library: packed codes, weights in their layout, `path` ignored."""

    def quantize(self, x: Tensor, bits: int = 4, path: str = "auto", **given: Any) -> Codes:
        codes, scale, zero = quantize(x, bits=bits, **given)
        return pack_int4(codes).view(torch.int8) if bits <= 4 else codes, scale, zero

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
        wide, codes = _wide(weight, w_bits), _wide(codes, a_bits)
        numbers = (a_bits, w_bits, a_group, w_group, swiglu, layout)
        return integer_linear(codes, scale, zero, wide, w_scale, w_sum, bias, residual, *numbers).to(y_type)

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
    ) -> Recorded:
        return head(codes, scale, weight, w_scale, logit_bias, inv_temp, top_k, layout)

    def rotate(
        self, x: Tensor, blocks: Tensor, perm: Tensor, y_type: torch.dtype = torch.float32, path: str = "auto"
    ) -> Tensor:
        return rotate(x, blocks, perm).to(y_type)
