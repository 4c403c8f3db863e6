"""One block of a random model with samples to learn from: grouped heads, biases, loud channels, padding."""

from dataclasses import replace

import torch
from torch import Tensor
from torch.fx import GraphModule

from passes.fit import Batch
from pipeline.capture import OneBlock, Piece, capture_piece
from pipeline.models.transformer import rotary_angles, rotary_frequencies
from tests.passes.samples import Listed
from tests.pipeline.random_models import tiny

PIECE = "blocks.0"
SITES = tuple(f"{PIECE}.{site}" for site in ("attn.q_k_v_proj", "attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"))
ROWS = 9


def block(*, kv_heads: int = 2, bias: bool = True) -> GraphModule:
    """Four query heads of eight channels, width 32, inner width 48; drawn from torch's seed."""
    config = replace(tiny(shifted=bias).config, num_heads=4, num_kv_heads=kv_heads, head_dim=8)
    weights = {}
    for name, like in OneBlock(config, 0).state_dict().items():
        scale = like.shape[-1] ** -0.5 if name.endswith("proj.weight") else 0.3
        weights[name] = torch.rand(like.shape) + 0.5 if "norm" in name else torch.randn(like.shape) * scale
    return capture_piece(config, Piece(PIECE, tuple(weights)), weights)


def samples(count: int = 6, *, batch: int = 2, loud: float = 8.0) -> Listed:
    """Canvases of nine rows, the last two of each second one padding; a few channels are `loud` times as large."""
    frequencies = rotary_frequencies(tiny(shifted=True).config)[:4]
    x = torch.randn(count, ROWS, 32)
    x[..., 3::11] *= loud
    every = torch.ones(count, ROWS, dtype=torch.bool)
    every[1::2, -2:] = False
    batches = []
    for first in range(0, count, batch):
        part, valid = x[first : first + batch], every[first : first + batch]
        batches.append(
            Batch(
                inputs=inputs(part, valid, frequencies),
                valid=valid,
                masked=torch.zeros_like(valid),
                noise=torch.zeros(len(part)),
                first=first,
            )
        )
    return Listed(batches)


def inputs(x: Tensor, valid: Tensor, frequencies: Tensor) -> tuple[Tensor, ...]:
    """What a block's graph takes."""
    cos, sin = rotary_angles(torch.arange(x.shape[1]).expand(x.shape[:2]), frequencies)
    visible = valid[:, None, None, :].expand(-1, 1, x.shape[1], -1)
    return x, cos, sin, visible, torch.zeros(x.shape[:2], dtype=torch.int32)
