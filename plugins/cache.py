"""Keys and values that stay between passes, and attention over them; both are standard nodes in the file.

Slot s of row b is seen by every query of the row when s < kv_len[b], and by none otherwise.
Shape letters: B batch, Q query rows, S slots, H query heads, J key/value heads, C channels a head.
"""

from collections.abc import Mapping

import onnx_ir as ir
import torch
import torch.nn.functional as F
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


def attend(q: Tensor, k: Tensor, v: Tensor, kv_len: Tensor, masked: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(C)) v [B, H, Q, C] over the seen slots; q [B, H, Q, C], k and v [B, J, S, C], kv_len [B].

    `masked` says how the node is told of them: by a mask, or by kv_len itself (from opset 24 on).
    """
    seen = torch.arange(k.shape[2], device=k.device) < kv_len[:, None]
    mask = seen[:, None, None, :].expand(-1, 1, q.shape[2], -1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


def write_attend(body: Body, v: Mapping[str, ir.Value], attributes: Attributes) -> list[ir.Value]:
    """Nodes of `attend`."""
    if not attributes["masked"]:
        return [body("Attention", v["q"], v["k"], v["v"], None, None, None, v["kv_len"], is_causal=0)]
    size = body.size(v["k"], 2)
    slots = body("Range", body.scalar(0, INT64), body("Squeeze", size, body.ints(0)), body.scalar(1, INT64))
    seen = body("Less", slots, body("Unsqueeze", v["kv_len"], body.ints(1)))
    # ORT refuses a mask whose query dimension is 1, hence the expand.
    shape = body.join(body.size(v["q"], 0), body.ints(1), body.size(v["q"], 2), size)
    mask = body("Expand", body("Unsqueeze", seen, body.ints(1, 2)), shape)
    return [body("Attention", v["q"], v["k"], v["v"], mask, is_causal=0)]


ATTEND = Op(
    name="attend",
    reference=attend,
    onnx_type="DllmcAttend",
    body=write_attend,
    inlined=True,
)
