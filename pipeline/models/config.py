"""What every stage may ask of a diffusion language model, whatever its family. No torch here."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes, constants and special ids of one model; `embedding_size` rows may exceed `vocab_size`."""

    family: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    embedding_size: int
    vocab_size: int
    max_length: int
    rope_theta: float
    norm_eps: float
    qkv_bias: bool
    tied_head: bool
    shifted_logits: bool
    mask_id: int
    eos_id: int
    pad_id: int
