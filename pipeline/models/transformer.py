"""The bidirectional transformer that LLaDA and Dream share, in plain torch that `torch.export` captures.

Shape letters: B batch, Q query rows, R head rows, D hidden, H query heads, J key/value heads, C channels a head,
I inner (MLP), V vocabulary. LLaDA (arXiv 2502.09992) has no biases; Dream (arXiv 2508.15487) is a Qwen2 without the
causal mask, with biases on q, k and v. Norms, RoPE and softmax are computed in float32.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.config import ModelConfig


class RMSNorm(nn.Module):
    """y = weight * x / sqrt(mean(x^2) + eps), computed in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), (x.shape[-1],), self.weight.float(), self.eps).to(x.dtype)


def rotary_frequencies(config: ModelConfig) -> Tensor:
    """Inverse frequencies [C/2] of the rotary embedding (arXiv 2104.09864), always computed on the CPU."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu") / config.head_dim
    return 1.0 / config.rope_theta**exponent


def rotary_angles(position_ids: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine [B, 1, Q, C] of the half-split rotary embedding."""
    angle = position_ids[:, None, :, None].float() * frequencies
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply the rotary embedding to x [B, H, Q, C]."""
    half = x.shape[-1] // 2
    # Not `chunk`: it becomes a sequence in ONNX, which TensorRT does not know.
    low, high = x[..., :half].float(), x[..., half:].float()
    turned = torch.cat((-high, low), dim=-1)
    return (x.float() * cos + turned * sin).to(x.dtype)


class Attention(nn.Module):
    """Full attention over the valid slots of each row; grouped keys and values when J < H."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        inner = config.num_heads * config.head_dim
        kv_inner = config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, inner, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_inner, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_inner, bias=config.qkv_bias)
        self.o_proj = nn.Linear(inner, config.hidden_size, bias=False)
        self.grouped = config.num_kv_heads != config.num_heads

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, visible: Tensor) -> Tensor:
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        z = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=self.grouped)
        y: Tensor = self.o_proj(z.transpose(1, 2).flatten(-2))
        return y


class Mlp(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return y


class Block(nn.Module):
    """One pre-norm transformer block; x [B, Q, D] is the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attn = Attention(config)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = Mlp(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, visible: Tensor) -> Tensor:
        x = x + self.attn(self.attn_norm(x), cos, sin, visible)
        y: Tensor = x + self.mlp(self.mlp_norm(x))
        return y


class Transformer(nn.Module):
    """Embedding, blocks, final norm and LM head; parameter names are ours, families map theirs onto them."""

    rope_frequencies: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.embedding_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.head = nn.Linear(config.hidden_size, config.embedding_size, bias=False)
        if config.tied_head:
            self.head.weight = self.embed.weight
        # A constant of the graph, not computed in it: runtimes' powers differ in the last place, times the position.
        frequencies = rotary_frequencies(config).to(self.embed.weight.device)
        self.register_buffer("rope_frequencies", frequencies, persistent=False)

    def hidden(self, input_ids: Tensor, position_ids: Tensor, kv_len: Tensor) -> Tensor:
        """Residual stream [B, Q, D] after the last block; slots at or beyond `kv_len` [B] are never attended."""
        x: Tensor = self.embed(input_ids)
        cos, sin = rotary_angles(position_ids, self.rope_frequencies)
        slots = torch.arange(input_ids.shape[1], device=input_ids.device)
        # ORT's Attention refuses a mask whose query dimension is 1, hence the expand.
        visible = (slots[None, :] < kv_len[:, None])[:, None, None, :].expand(-1, 1, input_ids.shape[1], -1)
        for block in self.blocks:
            x = block(x, cos, sin, visible)
        return x

    def logits(self, input_ids: Tensor, position_ids: Tensor, kv_len: Tensor) -> Tensor:
        """Logits [B, Q, V] of every row, before any shift."""
        y: Tensor = self.head(self.norm(self.hidden(input_ids, position_ids, kv_len)))
        return y
