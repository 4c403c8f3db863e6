"""RoPE, the cache and attention: torch code that both models share, so that it favours neither.

Shape letters: Q query rows, S cache slots, H query heads, J key/value heads, C channels a head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu.shapes import ModelShape


def rotary_table(shape: ModelShape, slots: int, device: torch.device) -> Tensor:
    """Cosine and sine [S, 2, C] of the half-split rotary embedding (arXiv 2104.09864), float32."""
    exponent = torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim
    angle = torch.arange(slots)[:, None] / shape.rope_theta**exponent
    angle = torch.cat((angle, angle), dim=-1)
    return torch.stack((angle.cos(), angle.sin()), dim=1).to(device)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.float().chunk(2, dim=-1)
    return (x.float() * cos + torch.cat((-high, low), dim=-1) * sin).to(x.dtype)


def place(qkv: Tensor, table: Tensor, positions: Tensor, keys: Tensor, values: Tensor, heads: int) -> Tensor:
    """Rotated queries [Q, H, C] of qkv [Q, (H + 2J) C]; keys and values go to the slots `positions` of [S, J, C]."""
    kv_heads, channels = keys.shape[1:]
    q, k, v = torch.split(torch.unflatten(qkv, -1, (-1, channels)), [heads, kv_heads, kv_heads], dim=1)
    cos, sin = table[positions][:, :, None].unbind(1)
    keys.index_copy_(0, positions, _rotated(k, cos, sin))
    values.index_copy_(0, positions, v)
    return _rotated(q, cos, sin)


def attend(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Full attention of q [Q, H, C] over every slot: [Q, H C]."""
    # Channels stay last in memory, rows first, so that the result needs no copy.
    query, key, value = (x.transpose(0, 1).unsqueeze(0) for x in (q, keys, values))
    z = F.scaled_dot_product_attention(query, key, value, enable_gqa=q.shape[1] != keys.shape[1])
    return z.squeeze(0).transpose(0, 1).flatten(1)
