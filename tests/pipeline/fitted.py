"""Small random models through every method: what the tests of exactness, of counts and of lowering share.

Weights are random and norms have gains; `grouped` has fewer key heads than query heads and biases, `odd` also sizes
that no power of two divides, one of them prime.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from passes.base import run
from passes.fit import Fit
from passes.graph import attributes
from passes.invariants import check_rewritten
from passes.methods import METHODS
from pipeline.calibrate import float_pieces
from pipeline.calibration.corpus import calibration_states
from pipeline.calibration.states import Sample, States, make_states
from pipeline.calibration.stream import Stream
from pipeline.capture import ENDS, capture_whole, constants
from pipeline.models import BUILTIN
from pipeline.models.checkpoint import Checkpoint, open_checkpoint, write_checkpoint
from pipeline.models.transformer import Transformer
from pipeline.quantize import quant_plan
from pipeline.recipe import Calibration, Recipe
from pipeline.recipe_file import load_recipe
from tests.exports import once
from tests.pipeline.random_models import V, tiny

SIZES: dict[str, dict[str, Any]] = {
    "llada": {"num_kv_heads": 2},
    "grouped": {
        "vocab_size": V,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 12,
    },
    "odd": {
        "vocab_size": V,
        "hidden_size": 54,
        "intermediate_size": 53,
        "num_heads": 9,
        "num_kv_heads": 3,
        "head_dim": 6,
    },
}
# Published settings would train for minutes or leave one group a row.
QUICK = ("flatquant.epochs=1", "star.epochs=1", "duquant.steps=8", "threads=1", "lowering.top_k=4")
SAMPLES, LENGTH = 8, 10


def checkpoint_of(name: str, root: Path) -> Checkpoint:
    """A built-in model, or a random one."""
    return open_checkpoint(BUILTIN[name]) if name in BUILTIN else random_checkpoint(name, root)


def random_checkpoint(name: str, root: Path) -> Checkpoint:
    """A folder with the model `name` of `SIZES`, written once."""

    def write(folder: Path) -> None:
        config = replace(tiny(shifted=name != "llada").config, **SIZES[name])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(11)
            model = Transformer(config)
            for parameter, value in model.named_parameters():
                if value.ndim == 1:
                    value.data.normal_(1.0 if "norm" in parameter else 0.0, 0.3)
        write_checkpoint(folder, config, model.state_dict(), torch.float32)

    return open_checkpoint(once(root / name, write))


def random_states(checkpoint: Checkpoint) -> States:
    """Noised canvases of several lengths."""
    draw = torch.Generator().manual_seed(5)
    lengths = [LENGTH - n % 4 for n in range(SAMPLES)]
    ids = torch.randint(0, V - 4, (SAMPLES, LENGTH), generator=draw).tolist()
    samples = [Sample(row[:length], 2) for row, length in zip(ids, lengths, strict=True)]
    return make_states(samples, checkpoint.config, seed=0, noised=True)


def built_in_states(checkpoint: Checkpoint) -> States:
    """Noised canvases of the text that the built-in models know: on it they have outliers."""
    tokenizer = checkpoint.tokenizer()
    return calibration_states(Calibration(samples=SAMPLES, length=32), tokenizer, checkpoint.config)


def quick_recipe(method: str, bits: tuple[int, int], *sets: str) -> Recipe:
    """A method at (weight, activation) bits, with what its built-in recipes say besides and groups that fit."""
    w_bits, a_bits = bits
    formats = [f"linear.w_bits={w_bits}", f"linear.a_bits={a_bits}"]
    formats += ["linear.symmetric=true", "linear.w_group=16"] if a_bits == 16 else []
    return load_recipe(f"{method}-w4a4", (*QUICK, *formats, *sets))


def rewritten_graph(
    checkpoint: Checkpoint, recipe: Recipe, states: States
) -> tuple[GraphModule, dict[str, Tensor], int]:
    """The whole graph as the method rewrites it on shapes, the pieces' weights, and how many places changed there."""
    config, method = checkpoint.config, METHODS[recipe.method]
    plan, weights, changed = quant_plan(recipe, config), constants(config), 0
    numbers: dict[str, float] = {}
    with Stream(states, constants(config)["rope_frequencies"]) as stream:
        for piece, graph in float_pieces(checkpoint):
            fit = Fit(samples=None if piece.name == ENDS else stream, seed=3, numbers=numbers)
            changed += sum(run(graph, method.rewrite(plan, fit), check_rewritten).values())
            if piece.name == ENDS:
                stream.enter(graph)
            else:
                stream.compute(graph)
                stream.advance()
            weights |= attributes(graph)
    whole = capture_whole(config, top_k=4, debug_logits=True)
    run(whole, method.rewrite(plan, Fit(seed=3, numbers=numbers)), check_rewritten)
    return whole, weights, changed


def feeds_of(checkpoint: Checkpoint, states: States) -> tuple[Tensor, ...]:
    """Inputs of the whole graph on which every row is a head row."""
    ids, bias = states.input_ids, torch.zeros(checkpoint.config.embedding_size)
    positions = torch.arange(ids.shape[1]).expand(ids.shape)
    return ids, positions, states.kv_len, positions.clone(), bias, torch.ones(len(ids))
