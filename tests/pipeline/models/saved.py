"""Checkpoint folders as transformers' `save_pretrained` writes them, with a family's names for keys and tensors."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from tests.pipeline.models.folders import LLADA_CONFIG

ROWS = 96
MASK_ID, EOS_ID, PAD_ID = 90, 80, 81
# Written against the published index of LLaDA-8B, not against our own table.
LLAMA_TO_LLADA = {
    r"model\.embed_tokens\.": "model.transformer.wte.",
    r"model\.norm\.": "model.transformer.ln_f.",
    r"lm_head\.": "model.transformer.ff_out.",
    r"model\.layers\.": "model.transformer.blocks.",
    r"self_attn\.([qkv])_proj": r"\1_proj",
    r"self_attn\.o_proj": "attn_out",
    r"mlp\.gate_proj": "ff_proj",
    r"mlp\.up_proj": "up_proj",
    r"mlp\.down_proj": "ff_out",
    r"input_layernorm": "attn_norm",
    r"post_attention_layernorm": "ff_norm",
}


def reference(family: str, *, kv_heads: int, tied: bool, bias: bool, **changes: Any) -> PreTrainedModel:
    """A small random Llama or Qwen2, gains and biases random too."""
    torch.manual_seed(3)
    sizes: dict[str, Any] = {
        "vocab_size": ROWS,
        "hidden_size": 64,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 128,
        "rope_theta": 5e5 if family == "llada" else 1e6,
        "rms_norm_eps": 1e-5 if family == "llada" else 1e-6,
        "tie_word_embeddings": tied,
        "initializer_range": 0.06,
        "attn_implementation": "eager",
        "bos_token_id": None,
        "eos_token_id": EOS_ID,
        "pad_token_id": PAD_ID,
        **changes,
    }
    if family == "llada":
        model: PreTrainedModel = LlamaForCausalLM(LlamaConfig(**sizes, attention_bias=bias))
    else:
        model = Qwen2ForCausalLM(Qwen2Config(**sizes))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.data.normal_(1.0 if "norm" in name else 0.0, 0.3)
        if name.endswith("o_proj.bias"):  # Llama puts a bias here, LLaDA has none
            parameter.data.zero_()
    return model.eval()


def write_as(
    family: str, model: PreTrainedModel, folder: Path, *, dtype: torch.dtype, shard_size: str, mask_id: int = MASK_ID
) -> None:
    """`save_pretrained`, then the family's names for keys and tensors."""
    copy.deepcopy(model).to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    values = json.loads((folder / "config.json").read_text())
    if family == "dream":
        values |= {"model_type": "Dream", "mask_token_id": mask_id}
        (folder / "config.json").write_text(json.dumps(values))
        return
    values = LLADA_CONFIG | {
        "d_model": values["hidden_size"],
        "mlp_hidden_size": values["intermediate_size"],
        "n_layers": values["num_hidden_layers"],
        "n_heads": values["num_attention_heads"],
        "n_kv_heads": values["num_key_value_heads"],
        "vocab_size": values["vocab_size"] - 5,
        "embedding_size": values["vocab_size"],
        "max_sequence_length": values["max_position_embeddings"],
        "weight_tying": values["tie_word_embeddings"],
        "include_qkv_bias": values["attention_bias"],
        "mask_token_id": mask_id,
        "eos_token_id": values["eos_token_id"],
        "pad_token_id": values["pad_token_id"],
    }
    (folder / "config.json").write_text(json.dumps(values))
    for path in folder.glob("*.safetensors"):
        tensors = {rename(name): t for name, t in load_file(path).items() if not name.endswith("o_proj.bias")}
        save_file(tensors, path, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    if index.exists():
        placed = json.loads(index.read_text())
        placed["weight_map"] = {
            rename(name): file for name, file in placed["weight_map"].items() if not name.endswith("o_proj.bias")
        }
        index.write_text(json.dumps(placed))


def rename(name: str) -> str:
    """Llama's tensor name as LLaDA spells it."""
    for theirs, ours in LLAMA_TO_LLADA.items():
        name = re.sub(rf"(^|\.){theirs}", rf"\g<1>{ours}".replace(r"\1", r"\2"), name)
    return name
