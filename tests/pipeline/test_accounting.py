"""Sizes by part and format: every byte of the sidecar files once, and what 16 bits would take."""

from collections.abc import Callable
from math import prod
from pathlib import Path

import pytest

from pipeline.accounting import take_account
from pipeline.models.checkpoint import Checkpoint, open_checkpoint
from pipeline.quantize import Weights, write_weights
from pipeline.recipe import Recipe
from pipeline.recipe_file import load_recipe
from tests.pipeline.fitted import quick_recipe, random_checkpoint, random_states

Made = Callable[..., Path]

RECIPES = {
    "fp16": load_recipe("fp16"),
    "w8a8": load_recipe("rtn-w8a8", ["embedding.bits=8"]),
    "w4a16": load_recipe("rtn-w4a16", ["linear.w_group=32", "linear.w_symmetric=true"]),
    "zeros": load_recipe("rtn-w4a16", ["linear.w_group=32", "linear.w_symmetric=false"]),
    "w4a4": load_recipe("rtn-w4a4", ["skip=['*.down_proj']"]),
    "asymmetric": load_recipe("rtn-w4a4", ["linear.symmetric=false"]),
}
FORMATS = {
    "fp16": {"embedding": "fp16", "head": "fp16", "linears": "fp16"},
    "w8a8": {
        "embedding": "int8 per row",
        "head": "int8 per channel, activations int8 per token",
        "linears": "int8 per channel, activations int8 per token",
    },
    "w4a16": {
        "embedding": "fp16",
        "head": "int8 per channel, activations int8 per token",
        "linears": "int4 group 32",
    },
    "zeros": {"linears": "int4 asymmetric group 32"},
    "w4a4": {"linears": "int4 per channel, activations int4 per token"},
    "asymmetric": {"linears": "int4 per channel, activations int4 asymmetric per token"},
}


def written(checkpoint: Checkpoint, recipe: Recipe, folder: Path) -> Weights:
    write_weights(checkpoint, recipe, folder, on_piece=lambda _: None)
    return Weights(folder)


@pytest.mark.parametrize("name", RECIPES)
def test_every_weight_is_counted_once(model: Made, name: str, tmp_path: Path) -> None:
    checkpoint, recipe = open_checkpoint(model("dream", layers=2)), RECIPES[name]
    weights = written(checkpoint, recipe, tmp_path)
    account = take_account(checkpoint, recipe, weights)
    assert sum(row.tensors for row in account.formats) == len(weights.names)
    assert sum(row.size_bytes for row in account.formats) == sum(weights.stored(n).nbytes for n in weights.names)
    # At 16 bits there would be the checkpoint's own elements and nothing else.
    elements = sum(prod(entry.shape) for entry in checkpoint.entries.values())
    assert sum(row.fp16_bytes for row in account.formats) == 2 * elements
    assert account.tensors_used == account.tensors_total == len(checkpoint.entries)
    kept = {"fp16": 8, "w4a4": 2}.get(name, 0)
    assert (account.linears_quantised, account.linears_kept) == (8 - kept, kept)
    found = {(row.part, row.format) for row in account.formats}
    assert FORMATS[name].items() <= found
    assert ("norms and biases", "fp32") in found
    assert (("linears", "fp16") in found) == bool(kept)


def test_transforms_are_a_part_that_16_bits_would_not_have(tmp_path: Path) -> None:
    checkpoint, recipe = random_checkpoint("grouped", tmp_path), quick_recipe("duquant", (4, 4))
    write_weights(checkpoint, recipe, tmp_path, states=random_states(checkpoint), on_piece=lambda _: None)
    weights = Weights(tmp_path)
    account = take_account(checkpoint, recipe, weights)
    assert sum(row.size_bytes for row in account.formats) == sum(weights.stored(n).nbytes for n in weights.names)
    transforms = {row.format: row for row in account.formats if row.part == "transforms"}
    assert transforms.keys() == {"fp32", "int64"}  # blocks and the order of their channels
    assert all(row.size_bytes > 0 and row.fp16_bytes == 0 for row in transforms.values())
    assert sum(row.tensors for row in account.formats) == len(weights.names)


def test_a_tied_model_counts_its_head_as_it_is_stored(model: Made, tmp_path: Path) -> None:
    """Embedding and head have formats of their own, so they are two tables in the bundle and at 16 bits."""
    checkpoint = open_checkpoint(model("llada", tied=True))
    account = take_account(checkpoint, RECIPES["w8a8"], written(checkpoint, RECIPES["w8a8"], tmp_path))
    by_part = {row.part: row for row in account.formats}
    table = 2 * checkpoint.config.embedding_size * checkpoint.config.hidden_size
    assert by_part["embedding"].fp16_bytes == by_part["head"].fp16_bytes == table
    assert account.tensors_used == account.tensors_total == len(checkpoint.entries)


def test_a_linear_in_another_format_than_the_recipe_gives_it_is_our_bug(model: Made, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(model("llada"))
    weights = written(checkpoint, RECIPES["w4a4"], tmp_path)
    with pytest.raises(RuntimeError, match=r"not stored as the recipe says: blocks\.0\.mlp\.down_proj"):
        take_account(checkpoint, load_recipe("rtn-w4a4"), weights)
