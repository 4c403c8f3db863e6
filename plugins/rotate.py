"""An explicit rotation, where no `quantize` follows to carry it: permute channels, then rotate block by block.

    y[..., b] = x[..., perm][..., b] blocks_b        x a row vector, b a block of c channels

Shape letters: K channels, c channels a block.
"""

from collections.abc import Mapping

import onnx_ir as ir
import torch
from torch import Tensor

from plugins.body import DOUBLE, FLOAT, Body
from plugins.op import Attributes, Op


def rotate(x: Tensor, blocks: Tensor, perm: Tensor) -> Tensor:
    """y float32 [..., K] from x [..., K], blocks [K/c, c, c], perm int64 [K]; summed in float64, rounded once."""
    tiles = torch.unflatten(x.double()[..., perm], -1, (-1, blocks.shape[-1]))
    return torch.einsum("...bi,bio->...bo", tiles, blocks.double()).flatten(-2).float()


def write_rotate(body: Body, v: Mapping[str, ir.Value], attributes: Attributes) -> list[ir.Value]:
    """Nodes of `rotate`: blocks as a batch, [K/c, M, c] x [K/c, c, c]."""
    rows = body("Flatten", body("Gather", v["x"], v["perm"], axis=-1), axis=-1)
    shape = body.join(body.ints(0, -1), body.size(v["blocks"], -1))
    tiles = body("Transpose", body("Reshape", body.cast(rows, DOUBLE), shape), perm=[1, 0, 2])
    y = body("Transpose", body("MatMul", tiles, body.cast(v["blocks"], DOUBLE)), perm=[1, 0, 2])
    return [body("Reshape", body.cast(y, FLOAT), body("Shape", v["x"]))]


ROTATE = Op(name="rotate", reference=rotate, onnx_type="DllmcRotate", body=write_rotate)
