"""Small checkpoint folders for every test of this room; nothing is read from outside the test's own folder."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.models.checkpoint import write_checkpoint
from pipeline.models.config import ModelConfig
from pipeline.models.transformer import Transformer

# The published config.json files, key for key, with small sizes.
LLADA_CONFIG: dict[str, Any] = {
    "activation_type": "silu",
    "alibi": False,
    "alibi_bias_max": 8.0,
    "architectures": ["LLaDAModelLM"],
    "attention_dropout": 0.0,
    "attention_layer_norm": False,
    "attention_layer_norm_with_affine": True,
    "auto_map": {
        "AutoConfig": "configuration_llada.LLaDAConfig",
        "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
        "AutoModel": "modeling_llada.LLaDAModelLM",
    },
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "d_model": 32,
    "embedding_dropout": 0.0,
    "embedding_size": 128,
    "eos_token_id": 81,
    "flash_attention": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "init_cutoff_factor": None,
    "init_device": "meta",
    "init_fn": "mitchell",
    "init_std": 0.02,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "mask_token_id": 90,
    "max_sequence_length": 256,
    "mlp_hidden_size": 48,
    "mlp_ratio": 4,
    "model_type": "llada",
    "multi_query_attention": None,
    "n_heads": 4,
    "n_kv_heads": 4,
    "n_layers": 2,
    "pad_token_id": 81,
    "precision": "amp_bf16",
    "residual_dropout": 0.0,
    "rms_norm_eps": 1e-05,
    "rope": True,
    "rope_full_precision": True,
    "rope_theta": 500000.0,
    "scale_logits": False,
    "transformers_version": "4.46.3",
    "use_cache": False,
    "vocab_size": 96,
    "weight_tying": False,
}
DREAM_CONFIG: dict[str, Any] = {
    "_name_or_path": "Dream-org/Dream-v0-Instruct-7B",
    "architectures": ["DreamModel"],
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"},
    "bos_token_id": 80,
    "eos_token_id": 80,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "mask_token_id": 90,
    "max_position_embeddings": 256,
    "max_window_layers": 2,
    "model_type": "Dream",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 80,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.46.2",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 96,
}
PUBLISHED = {"llada": LLADA_CONFIG, "dream": DREAM_CONFIG}


def make_config(family: str, **changes: Any) -> ModelConfig:
    """A model of two layers, with grouped heads for Dream."""
    dream = family == "dream"
    sizes: dict[str, Any] = {
        "family": family,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2 if dream else 4,
        "head_dim": 8,
        "embedding_size": 96 if dream else 128,
        "vocab_size": 96,
        "max_length": 256,
        "rope_theta": 1e6 if dream else 5e5,
        "norm_eps": 1e-6 if dream else 1e-5,
        "qkv_bias": dream,
        "tied_head": False,
        "shifted_logits": dream,
        "mask_id": 90,
        "eos_id": 80 if dream else 81,
        "pad_id": 80 if dream else 81,
    }
    return ModelConfig(**{**sizes, **changes})


def random_state(config: ModelConfig, seed: int = 0) -> dict[str, Tensor]:
    """Random weights, biases and norm gains, so that no term of the model is invisible."""
    draw = torch.Generator().manual_seed(seed)
    state = {name: tensor.detach().clone() for name, tensor in Transformer(config).state_dict().items()}
    for name, tensor in state.items():
        tensor.normal_(1.0 if "norm" in name else 0.0, 0.1, generator=draw)
    if config.tied_head:
        state["head.weight"] = state["embed.weight"]
    return state


def write_folder(
    folder: Path, family: str, *, shards: int = 1, dtype: torch.dtype = torch.float32, **changes: Any
) -> Path:
    """A good checkpoint folder, ready to be spoilt."""
    config = make_config(family, **changes)
    write_checkpoint(folder, config, random_state(config), dtype=dtype, shards=shards)
    return folder


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Apply `change` to the object in a JSON file."""
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
