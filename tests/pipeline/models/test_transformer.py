"""Our modules give the logits of transformers' Llama and Qwen2 under full attention, on folders transformers wrote."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.models.checkpoint import load_model, open_checkpoint
from pipeline.models.transformer import Transformer
from tests.pipeline.models.folders import make_config, random_state
from tests.pipeline.models.saved import ROWS, reference, write_as

TOLERANCE = 1e-5  # the issue's; both sides are float32 and differ in the order of sums only


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
