"""Keys and values that stay between passes; standard nodes in the file.

Shape letters: B batch, Q query rows, S slots, J key/value heads, C channels a head.
"""

from collections.abc import Mapping

import onnx_ir as ir
import torch
from torch import Tensor

from plugins.body import INT64, Body
from plugins.op import Attributes, Op


def cache_update(past: Tensor, new: Tensor, write_start: Tensor, scattered: bool = True) -> Tensor:
    """`past` [B, J, S, C] with `new` [B, J, Q, C] in slots write_start[b] .. write_start[b] + Q of each row b.

    `scattered` says how the node is written: TensorScatter, which a runtime may do in place, or Where.
    """
    slots = write_start[:, None] + torch.arange(new.shape[2], device=new.device)
    return past.scatter(2, slots[:, None, :, None].expand(new.shape), new)


def write_cache_update(body: Body, v: Mapping[str, ir.Value], attributes: Attributes) -> list[ir.Value]:
    """Nodes of `cache_update`."""
    if attributes["scattered"]:
        return [body("TensorScatter", v["past"], v["new"], v["write_start"], axis=2, mode="linear")]
    zero, one = body.scalar(0, INT64), body.scalar(1, INT64)
    slots = body("Range", zero, body("Squeeze", body.size(v["past"], 2), body.ints(0)), one)
    row = body("Sub", slots, body("Unsqueeze", v["write_start"], body.ints(1)))  # [B, S], 0 at the first new one
    last = body("Sub", body("Squeeze", body.size(v["new"], 2), body.ints(0)), one)
    nearest = body("Max", body("Min", row, last), zero)
    index = body("Expand", body("Unsqueeze", nearest, body.ints(1, 3)), body("Shape", v["past"]))
    inside = body("Unsqueeze", body("Equal", row, nearest), body.ints(1, 3))
    return [body("Where", inside, body("GatherElements", v["new"], index, axis=2), v["past"])]


CACHE_UPDATE = Op(
    name="cache_update",
    reference=cache_update,
    onnx_type="DllmcCacheUpdate",
    body=write_cache_update,
    inlined=True,
)
