"""The shipped models: trained (they answer), hard to quantise (round to nearest at W4A4 shows), genuine in layout."""

from pathlib import Path

import pytest

from pipeline.backends.backend import Session
from pipeline.backends.eager import open_transformer
from pipeline.models import BUILTIN
from pipeline.models.checkpoint import Checkpoint, load_model, open_checkpoint
from pipeline.quantize import Weights, write_weights
from pipeline.recipe_file import load_recipe
from pipeline.runner import Settings
from pipeline.tiny.problems import held_out
from pipeline.tiny.publish import exact_match
from pipeline.validate import torch_session

COUNT = 500
FILES = {
    "tiny-llada": {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"},
    "tiny-dream": {
        "config.json",
        "model.safetensors",
        "vocab.json",
        "merges.txt",
        "added_tokens.json",
        "tokenizer_config.json",
        "README.md",
    },
}


@pytest.fixture(scope="module", params=sorted(BUILTIN))
def checkpoint(request: pytest.FixtureRequest) -> Checkpoint:
    return open_checkpoint(BUILTIN[request.param])


def score(checkpoint: Checkpoint, session: Session) -> float:
    tokenizer = checkpoint.tokenizer()
    settings = Settings.of_model(checkpoint.config)
    return exact_match(session, settings, tokenizer, held_out(COUNT))["all"]


def test_layout_is_the_published_one(checkpoint: Checkpoint) -> None:
    assert {path.name for path in checkpoint.folder.iterdir()} == FILES[checkpoint.folder.name]
    assert sum(path.stat().st_size for path in checkpoint.folder.iterdir()) <= 8_000_000


def test_full_precision_answers_and_w4a4_forgets(checkpoint: Checkpoint, tmp_path: Path) -> None:
    full = score(checkpoint, open_transformer(load_model(checkpoint)))
    assert full >= 0.95
    recipe = load_recipe("rtn-w4a4")
    write_weights(checkpoint, recipe, tmp_path / "weights", on_piece=lambda _: None)
    rounded = score(checkpoint, torch_session(checkpoint, recipe, Weights(tmp_path / "weights"), lowered=False))
    assert rounded <= full - 0.10
