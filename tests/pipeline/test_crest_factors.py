"""Rotations do on the shipped models what they are for: no input of a linear has outliers any more."""

from collections.abc import Iterator
from functools import cache
from statistics import median

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from passes.base import run
from passes.fit import Batch, Fit
from passes.invariants import check_rewritten
from passes.methods import METHODS
from passes.observe import Observed
from pipeline.calibrate import float_pieces
from pipeline.calibration.corpus import calibration_states
from pipeline.calibration.stream import Stream
from pipeline.capture import ENDS, constants
from pipeline.models import BUILTIN
from pipeline.models.checkpoint import open_checkpoint
from pipeline.quantize import quant_plan
from pipeline.recipe_file import load_recipe

OUTLIERS = 6.0  # a normal row of 512 values has a ratio of about 3


def rewritten_blocks(model: str, recipe_name: str) -> Iterator[tuple[GraphModule, Stream]]:
    """Each block as the method rewrites it, with the stream of its inputs."""
    recipe = load_recipe(recipe_name, ["calibration.samples=12", "duquant.steps=24"])
    checkpoint = open_checkpoint(BUILTIN[model])
    tokenizer = checkpoint.tokenizer()
    states = calibration_states(recipe.calibration, tokenizer, checkpoint.config)
    plan, method = quant_plan(recipe, checkpoint.config), METHODS[recipe.method]
    with Stream(states, constants(checkpoint.config)["rope_frequencies"]) as stream:
        for piece, graph in float_pieces(checkpoint):
            fit = Fit(samples=None if piece.name == ENDS else stream, seed=recipe.calibration.seed)
            run(graph, method.rewrite(plan, fit), check_rewritten)
            if piece.name == ENDS:
                stream.enter(graph)
                continue
            yield graph, stream
            stream.compute(graph)
            stream.advance()


@cache
def crest_factors(model: str, recipe_name: str) -> dict[str, float]:
    """By site the mean over the tokens of max |x| / rms(x), x what the linear reads."""
    found: dict[str, list[Tensor]] = {}
    for graph, stream in rewritten_blocks(model, recipe_name):

        def measure(batch: Batch, graph: GraphModule = graph) -> None:
            def watch(site: str, x: Tensor, _: Tensor) -> None:
                rows = x[batch.valid]
                found.setdefault(site, []).append(rows.abs().amax(1) / rows.square().mean(1).sqrt())

            with torch.no_grad():
                Observed(graph, watch).run(*batch.inputs)

        list(stream.map(measure))
    return {site: float(torch.cat(parts).mean()) for site, parts in found.items()}


@pytest.mark.parametrize("model", BUILTIN)
@pytest.mark.parametrize("recipe", ["quarot-w4a4", "duquant-w4a4"])
def test_the_ratio_of_maximum_to_rms_falls(model: str, recipe: str) -> None:
    before, after = crest_factors(model, "rtn-w4a4"), crest_factors(model, recipe)
    assert before.keys() == after.keys()
    assert len(before) == 20
    loud = {site for site, ratio in before.items() if ratio > OUTLIERS}
    assert len(loud) >= 10
    for site in loud:
        assert after[site] <= 0.6 * before[site], f"{site}: {before[site]:.2f} -> {after[site]:.2f}"
    assert median(after.values()) <= 0.5 * median(before.values())
