"""LLaDA (arXiv 2502.09992): a Llama without the causal mask, its `config.json` in OLMo's keys."""

from collections.abc import Mapping
from typing import Any

from pipeline.models.config import ModelConfig
from pipeline.models.family import ModelFamily
from pipeline.models.fields import MAX_LAYERS, MAX_SIZE, Fields

# What our module does, or what is off; any other value changes the numbers. Dropout, initialisation and precision keys
# do not: they are about training, or about speed.
FEATURES: dict[str, tuple[Any, ...]] = {
    "activation_type": ("silu",),
    "alibi": (False,),
    "attention_layer_norm": (False,),
    "bias_for_layer_norm": (False,),
    "block_group_size": (1,),
    "block_type": ("llama",),
    "clip_qkv": (),
    "embedding_layer_norm": (False,),
    "include_bias": (False,),
    "input_emb_norm": (False,),
    "layer_norm_type": ("rms",),
    "layer_norm_with_affine": (True,),
    "norm_after": (False,),
    "quantization_config": (),
    "rope": (True,),
    "rope_scaling": (),
    "scale_logits": (False,),
}


def read_config(values: Mapping[str, Any]) -> ModelConfig:
    """A published `config.json` as a ModelConfig; raises InputRefused naming the key."""
    fields = Fields(values, "LLaDA")
    fields.refuse_switched_on(FEATURES)
    hidden, heads = fields.size("d_model"), fields.size("n_heads")
    vocab = fields.size("vocab_size")
    rows = fields.size("embedding_size") if fields.has("embedding_size") else vocab
    if rows < vocab:
        raise fields.refused("embedding_size", f"at least vocab_size = {vocab}, or null")
    eos_id = fields.token("eos_token_id", rows)
    return ModelConfig(
        family="llada",
        hidden_size=hidden,
        intermediate_size=_intermediate_size(fields, hidden),
        num_layers=fields.size("n_layers", MAX_LAYERS),
        num_heads=heads,
        head_dim=fields.head_dim("d_model", "n_heads"),
        num_kv_heads=_kv_heads(fields, heads),
        embedding_size=rows,
        vocab_size=vocab,
        max_length=fields.size("max_sequence_length"),
        rope_theta=fields.number("rope_theta"),
        norm_eps=fields.number("rms_norm_eps"),
        qkv_bias=fields.flag("include_qkv_bias") if fields.has("include_qkv_bias") else False,
        tied_head=fields.flag("weight_tying"),
        shifted_logits=False,
        mask_id=fields.token("mask_token_id", rows),
        eos_id=eos_id,
        pad_id=fields.pad(eos_id, rows),
    )


def _kv_heads(fields: Fields, heads: int) -> int:
    """`n_kv_heads`; where it is null one head if `multi_query_attention`, else as many as queries (OLMo)."""
    multi_query = fields.has("multi_query_attention") and fields.flag("multi_query_attention")
    if not fields.has("n_kv_heads"):
        return 1 if multi_query else heads
    if multi_query and fields.size("n_kv_heads") != 1:
        raise fields.refused("n_kv_heads", "1 or null, because multi_query_attention is true")
    return heads // fields.quotient("n_heads", "n_kv_heads")


def _intermediate_size(fields: Fields, hidden: int) -> int:
    """`mlp_hidden_size`; where it is null, `mlp_ratio` times the hidden size."""
    if fields.has("mlp_hidden_size") or not fields.has("mlp_ratio"):
        return fields.size("mlp_hidden_size")
    size = fields.number("mlp_ratio") * hidden
    if size > MAX_SIZE or size != int(size):
        raise fields.refused("mlp_ratio", f"a ratio that makes d_model = {hidden} a whole number up to {MAX_SIZE}")
    return int(size)


def write_config(config: ModelConfig) -> dict[str, Any]:
    """The published keys for one model; `auto_map` is left out, because no code lies beside our checkpoints."""
    return {
        "activation_type": "silu",
        "alibi": False,
        "alibi_bias_max": 8.0,
        "architectures": ["LLaDAModelLM"],
        "attention_dropout": 0.0,
        "attention_layer_norm": False,
        "attention_layer_norm_with_affine": True,
        "bias_for_layer_norm": False,
        "block_group_size": 1,
        "block_type": "llama",
        "d_model": config.hidden_size,
        "embedding_dropout": 0.0,
        "embedding_size": config.embedding_size,
        "eos_token_id": config.eos_id,
        "flash_attention": False,
        "include_bias": False,
        "include_qkv_bias": config.qkv_bias,
        "init_cutoff_factor": None,
        "init_device": "meta",
        "init_fn": "mitchell",
        "init_std": 0.02,
        "input_emb_norm": False,
        "layer_norm_type": "rms",
        "layer_norm_with_affine": True,
        "mask_token_id": config.mask_id,
        "max_sequence_length": config.max_length,
        "mlp_hidden_size": config.intermediate_size,
        "mlp_ratio": 4,
        "model_type": "llada",
        "multi_query_attention": None,
        "n_heads": config.num_heads,
        "n_kv_heads": config.num_kv_heads,
        "n_layers": config.num_layers,
        "pad_token_id": config.pad_id,
        "precision": "amp_bf16",
        "residual_dropout": 0.0,
        "rms_norm_eps": config.norm_eps,
        "rope": True,
        "rope_full_precision": True,
        "rope_theta": config.rope_theta,
        "scale_logits": False,
        "transformers_version": "4.46.3",
        "use_cache": False,
        "vocab_size": config.vocab_size,
        "weight_tying": config.tied_head,
    }


LLADA = ModelFamily(
    name="llada",
    model_type="llada",
    read_config=read_config,
    write_config=write_config,
    top={
        "embed.weight": "model.transformer.wte.weight",
        "norm.weight": "model.transformer.ln_f.weight",
        "head.weight": "model.transformer.ff_out.weight",
    },
    block_prefix="model.transformer.blocks.{}.",
    block={
        "attn_norm.weight": "attn_norm.weight",
        "attn.q_proj.weight": "q_proj.weight",
        "attn.k_proj.weight": "k_proj.weight",
        "attn.v_proj.weight": "v_proj.weight",
        "attn.o_proj.weight": "attn_out.weight",
        "mlp_norm.weight": "ff_norm.weight",
        "mlp.gate_proj.weight": "ff_proj.weight",
        "mlp.up_proj.weight": "up_proj.weight",
        "mlp.down_proj.weight": "ff_out.weight",
    },
)
