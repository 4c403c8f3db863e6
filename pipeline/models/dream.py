"""Dream (arXiv 2508.15487): a Qwen2 without the causal mask, whose output row i predicts position i + 1."""

from collections.abc import Mapping
from typing import Any

from pipeline.models.config import ModelConfig
from pipeline.models.family import ModelFamily
from pipeline.models.fields import MAX_LAYERS, Fields

# What our module does, or what is off; any other value changes the numbers.
FEATURES: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "mlp_bias": (False,),
    "attention_bias": (True,),
    "partial_rotary_factor": (1, 1.0),
    "quantization_config": (),
    "use_mrope": (False,),
    "use_qk_norm": (False,),
    "use_sliding_window": (False,),
}


def read_config(values: Mapping[str, Any]) -> ModelConfig:
    """A published `config.json` as a ModelConfig; raises InputRefused naming the key."""
    fields = Fields(values, "Dream")
    fields.refuse_switched_on(FEATURES)
    _refuse_other_layers(fields)
    heads = fields.size("num_attention_heads")
    rows = fields.size("vocab_size")
    eos_id = fields.token("eos_token_id", rows)
    return ModelConfig(
        family="dream",
        hidden_size=fields.size("hidden_size"),
        intermediate_size=fields.size("intermediate_size"),
        num_layers=fields.size("num_hidden_layers", MAX_LAYERS),
        num_heads=heads,
        head_dim=fields.head_dim("hidden_size", "num_attention_heads"),
        num_kv_heads=heads // fields.quotient("num_attention_heads", "num_key_value_heads"),
        embedding_size=rows,
        vocab_size=rows,
        max_length=fields.size("max_position_embeddings"),
        rope_theta=_rope_theta(fields),
        norm_eps=fields.number("rms_norm_eps"),
        qkv_bias=True,
        tied_head=fields.flag("tie_word_embeddings"),
        shifted_logits=True,
        mask_id=fields.token("mask_token_id", rows),
        eos_id=eos_id,
        pad_id=fields.pad(eos_id, rows),
    )


def _refuse_other_layers(fields: Fields) -> None:
    """Newer transformers list each layer's attention; only full attention is ours."""
    if fields.has("layer_types"):
        kinds = fields.require("layer_types")
        if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
            raise fields.refused("layer_types", "only 'full_attention', the one kind that dllmc implements")


def _rope_theta(fields: Fields) -> float:
    """`rope_theta`, which transformers 5 writes inside `rope_parameters`; scaled rotary embeddings are refused."""
    stated = []
    for key in ("rope_scaling", "rope_parameters"):
        if not fields.has(key):
            continue
        inner = fields.require(key)
        kind = inner.get("rope_type", inner.get("type", "default")) if isinstance(inner, dict) else None
        if kind != "default" or inner.get("partial_rotary_factor", 1) != 1:
            raise fields.refused(
                key, "null, or rope_type 'default' over all channels, the one kind that dllmc implements"
            )
        if "rope_theta" in inner:
            stated.append(Fields(inner, f"Dream, inside {key}").number("rope_theta"))
    if fields.has("rope_theta") or not stated:
        stated.append(fields.number("rope_theta"))
    if len(set(stated)) > 1:
        raise fields.refused("rope_theta", f"one value, found {sorted(set(stated))} in rope_theta and rope_parameters")
    return stated[0]


def write_config(config: ModelConfig) -> dict[str, Any]:
    """The published keys for one model; `auto_map` is left out, because no code lies beside our checkpoints."""
    if config.vocab_size != config.embedding_size or not config.qkv_bias:
        raise ValueError("a Dream config.json has one vocabulary size, and its q, k and v always have biases")
    values: dict[str, Any] = {
        "architectures": ["DreamModel"],
        "attention_dropout": 0.0,
        "bos_token_id": config.eos_id,
        "eos_token_id": config.eos_id,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": config.intermediate_size,
        "mask_token_id": config.mask_id,
        "max_position_embeddings": config.max_length,
        "max_window_layers": config.num_layers,
        "model_type": "Dream",
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
        "pad_token_id": config.pad_id,
        "rms_norm_eps": config.norm_eps,
        "rope_scaling": None,
        "rope_theta": config.rope_theta,
        "sliding_window": None,
        "tie_word_embeddings": config.tied_head,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.46.2",
        "use_cache": True,
        "use_mrope": False,
        "use_sliding_window": False,
        "vocab_size": config.vocab_size,
    }
    if config.head_dim * config.num_heads != config.hidden_size:
        values["head_dim"] = config.head_dim
    return values


DREAM = ModelFamily(
    name="dream",
    model_type="Dream",
    read_config=read_config,
    write_config=write_config,
    top={
        "embed.weight": "model.embed_tokens.weight",
        "norm.weight": "model.norm.weight",
        "head.weight": "lm_head.weight",
    },
    block_prefix="model.layers.{}.",
    block={
        "attn_norm.weight": "input_layernorm.weight",
        "attn.q_proj.weight": "self_attn.q_proj.weight",
        "attn.k_proj.weight": "self_attn.k_proj.weight",
        "attn.v_proj.weight": "self_attn.v_proj.weight",
        "attn.o_proj.weight": "self_attn.o_proj.weight",
        "mlp_norm.weight": "post_attention_layernorm.weight",
        "mlp.gate_proj.weight": "mlp.gate_proj.weight",
        "mlp.up_proj.weight": "mlp.up_proj.weight",
        "mlp.down_proj.weight": "mlp.down_proj.weight",
    },
)
