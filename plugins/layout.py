"""Orders of the bytes of a weight matrix: a kernel wants whole operands side by side, the portable file wants rows.

    0  canonical: rows of K
    1  fragment: tiles of 16 outputs x 64 bytes of K, in the order in which the lanes of a warp hold an operand of the
       tensor core (plugins/cuda/format.h); 64 bytes are 128 codes of 4 bits or 64 of 8 bits

Shape letters: N outputs, K inner.
"""

import onnx_ir as ir
import torch
from torch import Tensor

from plugins.body import INT8, Body

TILE_OUTPUTS = 16
TILE_BYTES = 64

# Layout -> axes of [N/16, pair 8, gate or up 2, K/64, t 4, step 2, half 2, byte 4] in the order they are stored.
_ORDERS: dict[int, tuple[int, ...]] = {0: tuple(range(8)), 1: (0, 3, 5, 1, 4, 6, 2, 7)}
LAYOUTS = tuple(_ORDERS)


def _tiles(shape: torch.Size, layout: int, codes_per_byte: int) -> tuple[int, ...]:
    outputs, size = shape[0], TILE_BYTES * codes_per_byte
    if layout not in _ORDERS:
        raise ValueError(f"unknown weight layout; got {layout}, expected one of {LAYOUTS}")
    if layout and (outputs % TILE_OUTPUTS or shape[1] % size):
        raise ValueError(f"weight does not split into tiles; got {list(shape)}, expected multiples of [16, {size}]")
    return (outputs // TILE_OUTPUTS, 8, 2, shape[1] // size, 4, 2, 2, 4 * codes_per_byte)


def to_layout(weight: Tensor, layout: int, codes_per_byte: int = 1) -> Tensor:
    """Reorder canonical bytes [N, K_bytes], or codes [N, K] that share bytes, into `layout`; same shape and dtype.

    Raises ValueError for an unknown layout and for sizes that do not split into tiles.
    """
    tiles = _tiles(weight.shape, layout, codes_per_byte)
    return weight.reshape(tiles).permute(_ORDERS[layout]).reshape(weight.shape) if layout else weight


def from_layout(weight: Tensor, layout: int, codes_per_byte: int = 1) -> Tensor:
    """Inverse of `to_layout`."""
    tiles = _tiles(weight.shape, layout, codes_per_byte)
    if not layout:
        return weight
    order = _ORDERS[layout]
    stored = [tiles[axis] for axis in order]
    back = [order.index(axis) for axis in range(len(order))]
    return weight.reshape(stored).permute(back).reshape(weight.shape)


def write_canonical(body: Body, weight: ir.Value, layout: int, codes_per_byte: int = 1) -> ir.Value:
    """Nodes of `from_layout` on codes [N, K]: INT8 in canonical order; the value itself for layout 0."""
    if not layout:
        return weight
    tiles = _tiles(torch.Size((TILE_OUTPUTS, TILE_BYTES * codes_per_byte)), layout, codes_per_byte)
    order = _ORDERS[layout]
    columns = body("Div", body.size(weight, -1), body.ints(TILE_BYTES * codes_per_byte))
    sizes = {0: body.ints(-1), 3: columns}
    stored = body.join(*(sizes.get(axis) or body.ints(tiles[axis]) for axis in order))
    # INT4 has no Reshape kernel.
    tile = body("Reshape", body.cast(weight, INT8), stored)
    rows = body("Transpose", tile, perm=[order.index(axis) for axis in range(len(order))])
    return body("Reshape", rows, body("Shape", weight))
