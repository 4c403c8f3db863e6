"""Attention over the slots of a cache that are in use; a standard node in the file.

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


def attend(q: Tensor, k: Tensor, v: Tensor, kv_len: Tensor, masked: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(C)) v [B, H, Q, C] over the seen slots; q [B, H, Q, C], k and v [B, J, S, C], kv_len [B].

    `masked` says how the node is told of them: by a mask, or by kv_len itself (from opset 24 on).
    """
    seen = torch.arange(k.shape[2], device=k.device) < kv_len[:, None]
    mask = seen[:, None, None, :].expand(-1, 1, q.shape[2], -1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


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
