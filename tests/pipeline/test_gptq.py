"""GPTQ over a whole model: each block learns behind quantised blocks, and workers change nothing."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from passes.graph import attributes, calls, set_attributes, site_of
from passes.hessians import hessian
from passes.solvers.gptq import gptq
from passes.solvers.nearest import round_to_nearest
from pipeline.calibrate import float_pieces
from pipeline.calibration.corpus import calibration_states
from pipeline.calibration.stream import Means, Stream
from pipeline.capture import ENDS, constants
from pipeline.models import resolve
from pipeline.models.checkpoint import Checkpoint, open_checkpoint
from pipeline.quantize import Weights, write_weights
from pipeline.recipe import Recipe
from pipeline.recipe_file import load_recipe
from plugins.dequantize import dequantize
from tests.passes.grids import values
from tests.pipeline.fitted import quick_recipe, random_checkpoint, random_states

WEIGHT_ONLY = quick_recipe("gptq", (3, 16), "linear.w_symmetric=false")


def written(checkpoint: Checkpoint, recipe: Recipe, folder: Path, means: Means | None = None) -> Weights:
    states = random_states(checkpoint)
    write_weights(checkpoint, recipe, folder, states=states, means=means, on_piece=lambda _: None)
    return Weights(folder)


def value(weights: Weights, site: str, recipe: Recipe) -> Tensor:
    """What the linear at `site` computes with."""
    zero = weights[f"{site}.w_zero"] if f"{site}.w_zero" in weights.names else None
    part = recipe.linear
    return dequantize(weights[f"{site}.codes"], weights[f"{site}.w_scale"], part.w_bits, part.w_group, zero)


def put_in(graph: GraphModule, weights: Weights, sites: list[str], recipe: Recipe) -> None:
    """Float linears with the values of quantised ones."""
    set_attributes(graph, attributes(graph) | {f"{site}.weight": value(weights, site, recipe) for site in sites})


@pytest.mark.parametrize("recipe", [WEIGHT_ONLY, quick_recipe("gptq", (4, 4))], ids=["w3a16", "w4a4"])
@pytest.mark.parametrize("family", ["llada", "grouped"])
def test_each_linear_is_solved_behind_all_linears_before_it(family: str, recipe: Recipe, tmp_path: Path) -> None:
    """In float activations, whatever the recipe makes of them later, as published."""
    checkpoint = random_checkpoint(family, tmp_path)
    weights, part = written(checkpoint, recipe, tmp_path), recipe.linear
    solved = 0
    with Stream(random_states(checkpoint), constants(checkpoint.config)["rope_frequencies"]) as stream:
        for piece, graph in float_pieces(checkpoint):
            if piece.name == ENDS:
                stream.enter(graph)
                continue
            for linear in calls(graph, torch.ops.aten.linear.default):
                site = site_of(linear)
                expected = gptq(
                    attributes(graph)[f"{site}.weight"],
                    hessian(graph, linear, stream),
                    bits=part.w_bits,
                    group=part.w_group,
                    symmetric=part.w_symmetric,
                    damping=0.01,
                    block=128,
                )
                assert torch.equal(weights[f"{site}.codes"], expected.codes), site
                assert torch.equal(weights[f"{site}.w_scale"], expected.scale), site
                put_in(graph, weights, [site], recipe)
                solved += 1
            stream.compute(graph)
            stream.advance()
    assert solved == 4 * checkpoint.config.num_layers


def test_workers_change_no_byte(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(random_checkpoint("grouped", tmp_path / "model").folder)
    for workers in (1, 3):
        written(checkpoint, WEIGHT_ONLY, tmp_path / str(workers), Means(workers=workers))
    files = sorted((tmp_path / "1").iterdir())
    assert len(files) == 4
    for path in files:
        assert path.read_bytes() == (tmp_path / "3" / path.name).read_bytes()


@pytest.mark.parametrize("name", ["gptq-w3a16", "gptq-w4a4"])
@pytest.mark.parametrize("model", ["tiny-llada", "tiny-dream"])
def test_output_error_is_below_that_of_nearest_on_every_linear(model: str, name: str) -> None:
    """Of the reference models, each behind what GPTQ made of the linears before it; measured: 0.11 to 0.38 of it."""
    checkpoint = open_checkpoint(resolve(f"builtin:{model}"))
    tokenizer = checkpoint.tokenizer()
    recipe = load_recipe(name, ["calibration.samples=16"])
    part, shares = recipe.linear, {}
    states = calibration_states(recipe.calibration, tokenizer, checkpoint.config)
    with Stream(states, constants(checkpoint.config)["rope_frequencies"]) as stream:
        for piece, graph in float_pieces(checkpoint):
            if piece.name == ENDS:
                stream.enter(graph)
                continue
            for linear in calls(graph, torch.ops.aten.linear.default):
                site = site_of(linear)
                weight, moments = attributes(graph)[f"{site}.weight"], hessian(graph, linear, stream)
                form = {"bits": part.w_bits, "group": part.w_group, "symmetric": part.w_symmetric}
                solved = values(gptq(weight, moments, **form, damping=0.01, block=128))
                errors = [
                    float((((each - weight) @ moments.double()) * (each - weight)).sum())
                    for each in (solved, values(round_to_nearest(weight, **form)))
                ]
                shares[site] = errors[0] / errors[1]
                set_attributes(graph, attributes(graph) | {f"{site}.weight": solved.float()})
            stream.compute(graph)
            stream.advance()
    assert len(shares) == 4 * checkpoint.config.num_layers
    assert max(shares.values()) <= 0.6, shares
