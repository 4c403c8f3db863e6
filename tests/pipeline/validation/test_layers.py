"""How far each linear moves: the right figure, largest first, one piece in memory at a time."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.fx import GraphModule

from passes.graph import attributes
from pipeline.models.checkpoint import open_checkpoint
from pipeline.quantize import Weights, simulate, write_weights
from pipeline.recipe import Recipe
from pipeline.recipe_file import load_recipe
from pipeline.validate import measurement_states
from pipeline.validation import layers
from pipeline.validation.layers import site_errors
from tests.conftest import Made
from tests.pipeline.validation.conftest import Lowered
from tests.pipeline.watched import Watched, uncollected

SITES = {
    "blocks.0.attn.q_k_v_proj",
    "blocks.0.attn.o_proj",
    "blocks.0.mlp.gate_up_proj",
    "blocks.0.mlp.down_proj",
    "head",
}


def errors_of(lowered: Lowered, recipe: Recipe, folder: Path) -> dict[str, float]:
    write_weights(lowered.checkpoint, recipe, folder, on_piece=lambda _: None)
    return site_errors(lowered.checkpoint, recipe, Weights(folder), lowered.states)


def test_every_linear_is_named_largest_first(lowered: Lowered) -> None:
    errors = site_errors(lowered.checkpoint, lowered.recipe, lowered.weights, lowered.states)
    assert errors.keys() == SITES
    assert list(errors.values()) == sorted(errors.values(), reverse=True)


def test_more_bits_move_less(lowered: Lowered, tmp_path: Path) -> None:
    four = errors_of(lowered, load_recipe("rtn-w4a4"), tmp_path / "4")
    eight = errors_of(lowered, load_recipe("rtn-w8a8"), tmp_path / "8")
    half = errors_of(lowered, load_recipe("fp16"), tmp_path / "16")
    for site in SITES - {"head"}:
        assert eight[site] <= four[site] / 50  # steps are 18 times finer, their squares 300
        assert half[site] <= 1e-6
    assert 0 < eight["head"] <= 1e-3


def test_the_figure_is_the_relative_squared_error(lowered: Lowered) -> None:
    errors = site_errors(lowered.checkpoint, lowered.recipe, lowered.weights, lowered.states)
    checkpoint, states = lowered.checkpoint, lowered.states
    valid = torch.arange(states.input_ids.shape[1])[None, :] < states.kv_len[:, None]
    x = checkpoint.tensor("embed.weight").float()[states.input_ids][valid]
    x = torch.nn.functional.rms_norm(
        x, (64,), checkpoint.tensor("blocks.0.attn_norm.weight").float(), checkpoint.config.norm_eps
    )
    site = "blocks.0.attn.q_k_v_proj"
    weight = torch.cat([checkpoint.tensor(f"blocks.0.attn.{p}_proj.weight").float() for p in "qkv"])
    scale = x.abs().amax(-1, keepdim=True) / 7
    scale[scale == 0] = 1.0  # the end-of-text's embedding is all zero
    rounded = torch.round(x / scale).clamp(-7, 7) * scale
    exact = x @ weight.T
    found = rounded @ (lowered.weights[f"{site}.codes"] * lowered.weights[f"{site}.w_scale"]).T
    expected = float((found - exact).square().sum() / exact.square().sum())
    assert errors[site] == pytest.approx(expected, rel=1e-4)


def test_no_piece_is_solved_again(lowered: Lowered, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulation sees shapes alone; the weights come from the files."""
    seen: list[str] = []

    def watched(graph: GraphModule, *rest: Any) -> dict[str, int]:
        seen.extend(str(value.device) for value in attributes(graph).values())
        return simulate(graph, *rest)

    monkeypatch.setattr(layers, "simulate", watched)
    site_errors(lowered.checkpoint, lowered.recipe, lowered.weights, lowered.states)
    assert set(seen) == {"meta"}


def test_a_tied_head_is_measured(model: Made, lowered: Lowered, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(model("llada", tied=True))
    write_weights(checkpoint, lowered.recipe, tmp_path, on_piece=lambda _: None)
    errors = site_errors(checkpoint, lowered.recipe, Weights(tmp_path), lowered.states)
    assert 0 < errors["head"] <= 1e-3


def test_a_spoilt_linear_comes_first(lowered: Lowered, tmp_path: Path) -> None:
    shutil.copytree(lowered.work / "weights", tmp_path / "weights")
    path = tmp_path / "weights" / "blocks.0.safetensors"
    tensors = load_file(path)
    tensors["blocks.0.mlp.down_proj.w_scale"] *= 5
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(tensors, path, metadata)
    errors = site_errors(lowered.checkpoint, lowered.recipe, Weights(tmp_path / "weights"), lowered.states)
    assert next(iter(errors)) == "blocks.0.mlp.down_proj"
    assert errors["blocks.0.mlp.down_proj"] > 10


def test_one_piece_is_in_memory_at_a_time(model: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, recipe = open_checkpoint(model("llada", layers=4)), load_recipe("rtn-w4a4")
    write_weights(checkpoint, recipe, tmp_path, on_piece=lambda _: None)
    tokenizer = checkpoint.tokenizer()
    states = measurement_states(checkpoint, recipe, tokenizer)
    watched = Watched(monkeypatch)
    with uncollected():
        site_errors(checkpoint, recipe, Weights(tmp_path), states)
    assert watched.alive == [0] * 5
