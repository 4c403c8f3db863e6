"""Our modules give the logits of transformers' Llama and Qwen2 under full attention, on folders transformers wrote."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from pipeline.models.checkpoint import load_model, open_checkpoint
from pipeline.models.transformer import Transformer
from tests.pipeline.models.folders import LLADA_CONFIG, make_config, random_state

TOLERANCE = 1e-5  # the issue's; both sides are float32 and differ in the order of sums only
ROWS = 96
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


def reference(family: str, *, kv_heads: int, tied: bool, bias: bool) -> PreTrainedModel:
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
        "eos_token_id": 80,
        "pad_token_id": 81,
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


def write_as(family: str, model: PreTrainedModel, folder: Path, *, dtype: torch.dtype, shard_size: str) -> None:
    """`save_pretrained`, then the family's names for keys and tensors."""
    copy.deepcopy(model).to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    values = json.loads((folder / "config.json").read_text())
    if family == "dream":
        values |= {"model_type": "Dream", "mask_token_id": 90}
        (folder / "config.json").write_text(json.dumps(values))
        return
    values = LLADA_CONFIG | {
        "d_model": values["hidden_size"],
        "mlp_hidden_size": values["intermediate_size"],
        "n_layers": values["num_hidden_layers"],
        "n_heads": values["num_attention_heads"],
        "n_kv_heads": values["num_key_value_heads"],
        "vocab_size": ROWS - 5,
        "embedding_size": ROWS,
        "max_sequence_length": values["max_position_embeddings"],
        "weight_tying": values["tie_word_embeddings"],
        "include_qkv_bias": values["attention_bias"],
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
    for theirs, ours in LLAMA_TO_LLADA.items():
        name = re.sub(rf"(^|\.){theirs}", rf"\g<1>{ours}".replace(r"\1", r"\2"), name)
    return name


def both(model: PreTrainedModel, ours: Transformer, length: int) -> tuple[Tensor, Tensor]:
    """Logits [3, length, V] of the two, full attention."""
    ids = torch.randint(0, ROWS, (3, length), generator=torch.Generator().manual_seed(length))
    positions = torch.arange(length).expand(3, length)
    with torch.no_grad():
        full = torch.zeros(3, 1, length, length)
        theirs = model(input_ids=ids, attention_mask=full, position_ids=positions, use_cache=False).logits
        return theirs, ours.logits(ids, positions, torch.full((3,), length))


@pytest.mark.parametrize(
    ("family", "kv_heads", "tied", "bias"),
    [
        ("llada", 4, False, False),
        ("llada", 2, True, False),
        ("llada", 1, False, True),
        ("dream", 4, True, True),
        ("dream", 2, False, True),
    ],
)
def test_logits_equal_those_of_transformers(tmp_path: Path, family: str, kv_heads: int, tied: bool, bias: bool) -> None:
    model = reference(family, kv_heads=kv_heads, tied=tied, bias=bias)
    write_as(family, model, tmp_path, dtype=torch.float32, shard_size="1GB")
    ours = load_model(open_checkpoint(tmp_path))
    worst, largest = 0.0, 0.0
    for length in range(1, 129):
        theirs, logits = both(model, ours, length)
        worst = max(worst, (theirs - logits).abs().max().item())
        largest = max(largest, theirs.abs().max().item())
    print(f"{family}: worst difference {worst:.2e} of logits up to {largest:.1f}")
    assert largest > 1.0
    assert worst <= TOLERANCE


@pytest.mark.parametrize(("family", "tied"), [("llada", False), ("llada", True), ("dream", False), ("dream", True)])
def test_sharded_bfloat16_folders_load(tmp_path: Path, family: str, tied: bool) -> None:
    model = reference(family, kv_heads=2, tied=tied, bias=family == "dream")
    write_as(family, model, tmp_path, dtype=torch.bfloat16, shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config.tied_head == tied
    for parameter in model.parameters():  # rounded one by one: `.to` would round its rotary frequencies as well
        parameter.data = parameter.data.bfloat16().float()
    theirs, logits = both(model, load_model(checkpoint), 37)
    assert (theirs - logits).abs().max().item() <= TOLERANCE


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_a_row_does_not_see_its_padding(family: str) -> None:
    """A short row in a padded batch gives what it gives alone, whatever ids stand in the padding."""
    config = make_config(family)
    model = Transformer(config).eval()
    model.load_state_dict(random_state(config))
    ids = torch.randint(0, config.vocab_size, (2, 20), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(20).expand(2, 20)
    with torch.no_grad():
        batch = model.logits(ids, positions, torch.tensor([13, 20]))[0, :13]
        alone = model.logits(ids[:1, :13], positions[:1, :13], torch.tensor([13]))[0]
    assert (batch - alone).abs().max().item() <= TOLERANCE


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_only_differences_of_positions_matter(family: str) -> None:
    """Rotary embeddings are relative: the same ids further along give the same logits."""
    config = make_config(family)
    model = Transformer(config).eval()
    model.load_state_dict(random_state(config))
    ids = torch.randint(0, config.vocab_size, (1, 16), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(16)[None]
    with torch.no_grad():
        here, there, wider = (
            model.logits(ids, p, torch.tensor([16])) for p in (positions, positions + 5, positions * 2)
        )
    assert (here - there).abs().max().item() <= TOLERANCE
    assert (here - wider).abs().max().item() > 1e-3
