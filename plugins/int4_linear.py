"""Linear layer with 4-bit weights on 4- or 8-bit activation codes; the formula is in `integer_linear`.

Weights are ONNX INT4 [N, K], two codes a byte, low nibble first. Shape letters: N outputs, K inner, G groups.
"""

from torch import Tensor

from plugins.integer_linear import LINEAR_FLAGS, integer_linear, write_linear
from plugins.op import Op


def int4_linear(
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
    layout: int = 0,
) -> Tensor:
    """y float32 [..., N] from codes int8 [..., K], weight int8 [N, K], w_scale [N, 1] or [N, G], w_sum int32 [N, G]."""
    return integer_linear(
        codes, scale, zero, weight, w_scale, w_sum, bias, residual, a_bits, w_bits, a_group, w_group, swiglu, layout
    )


INT4_LINEAR = Op(
    name="int4_linear",
    reference=int4_linear,
    onnx_type="DllmcInt4Linear",
    body=write_linear,
    narrow=lambda attributes: ("weight",),
    flags=LINEAR_FLAGS,
)
