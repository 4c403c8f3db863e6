"""The value that quantised activations stand for, in float: what accuracy is measured on before lowering."""

from torch import Tensor

from plugins.affine_grid import quantize_rows, split_groups
from plugins.op import Op


def fake_quant(
    x: Tensor, bits: int, symmetric: bool = True, a_group: int = 0, clip_lo: float = 1.0, clip_hi: float = 1.0
) -> Tensor:
    """s (q + z) of the grid that `quantize` puts x [..., K] on, float32 [..., K]."""
    codes, scale, zero = quantize_rows(split_groups(x.float(), a_group), bits, symmetric, clip_lo, clip_hi)
    return ((codes if zero is None else codes + zero) * scale).flatten(-2)


FAKE_QUANT = Op(name="fake_quant", reference=fake_quant)
