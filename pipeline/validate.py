"""Stage validate: prove the ONNX model, fail closed, write validation.json and golden/."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from passes.base import run
from passes.invariants import check_lowered
from passes.lowering import LOWERING
from pipeline.backends.eager import EagerSession, open_transformer
from pipeline.backends.ort import open_session
from pipeline.calibration.states import States, builtin_corpus, noised_states
from pipeline.capture import capture_whole, materialise
from pipeline.errors import ValidationFailed
from pipeline.folder import GOLDEN, MODEL, VALIDATION, write_json
from pipeline.models.checkpoint import Checkpoint, load_model
from pipeline.quantize import Weights, simulate
from pipeline.recipe import Recipe
from pipeline.validation.feeds import scored_batches, sweep
from pipeline.validation.forced import ForcedModel
from pipeline.validation.golden import write_golden
from pipeline.validation.layers import site_errors
from pipeline.validation.nodes import NodeCheck, check_nodes
from pipeline.validation.passes import PassCheck, check_passes
from pipeline.validation.quality import Quality, compare

BATCH = 16
LAYER_SAMPLES = 16
WORST_SHOWN = 3
NODE_SHAPE = (3, 33)


def torch_session(checkpoint: Checkpoint, recipe: Recipe, weights: Weights, *, lowered: bool) -> EagerSession:
    """The whole quantised model in torch: simulated, or as the references of the ops that were exported."""
    graph = capture_whole(checkpoint.config, top_k=recipe.lowering.top_k)
    simulate(graph, recipe)
    if lowered:
        run(graph, LOWERING, check_lowered)
    return EagerSession(materialise(graph, weights.all()), top_k=recipe.lowering.top_k)


def measurement_states(checkpoint: Checkpoint, recipe: Recipe, tokenizer: Tokenizer) -> States:
    """Held-out problems at every noise level, other draws than calibration's."""
    part = recipe.validation
    corpus = builtin_corpus(part.samples, part.seed, held_out=True)
    config = checkpoint.config
    return noised_states(
        corpus, tokenizer, config, length=min(recipe.calibration.length, config.max_length), seed=part.seed
    )


def validate(
    checkpoint: Checkpoint, recipe: Recipe, work: Path, tokenizer: Tokenizer, *, on_pass: Callable[[int, int], None]
) -> dict[str, Any]:
    """Write the proof into `work`. Raises ValidationFailed, with the worst layers named, and then leaves no proof."""
    config = checkpoint.config
    weights = Weights(work / "weights")
    candidate = open_session(work / MODEL, threads=recipe.threads)
    reference = torch_session(checkpoint, recipe, weights, lowered=True)
    feeds = list(sweep(config, recipe.validation.seed))
    graph = reference.graph
    assert isinstance(graph, torch.fx.GraphModule)
    largest = max(feeds, key=lambda one: one.input_ids.size)
    middle = next((one for one in feeds if one.input_ids.shape == NODE_SHAPE), largest)
    nodes = check_nodes(work / MODEL, graph, [torch.from_numpy(array) for array in middle.as_dict().values()])
    passes = check_passes(reference, candidate, ForcedModel(work / MODEL, graph), feeds, on_pass=on_pass)
    states = measurement_states(checkpoint, recipe, tokenizer)
    exact = open_transformer(load_model(checkpoint), top_k=recipe.lowering.top_k)
    quality = compare(exact, candidate, scored_batches(config, states, BATCH), config.embedding_size)
    errors = site_errors(checkpoint, recipe, weights, next(states.batches(LAYER_SAMPLES)))
    report = _report(recipe, nodes, passes, quality, errors)
    if faults := _faults(recipe, nodes, passes, quality):
        worst = ", ".join(f"{site} ({error:.2g})" for site, error in list(errors.items())[:WORST_SHOWN])
        raise ValidationFailed(
            f"{'; '.join(faults)}; nothing was published. Linears whose output moved most (relative squared error): "
            f"{worst}; keep some at 16 bits with --set 'skip=[NAME]', choose a recipe with more bits, or publish it "
            "unvalidated with --validate off"
        )
    write_golden(work / GOLDEN, candidate, reference, config, recipe.validation.seed)
    write_json(work / VALIDATION, report)
    return report


def _report(
    recipe: Recipe, nodes: list[NodeCheck], passes: PassCheck, quality: Quality, errors: dict[str, float]
) -> dict[str, Any]:
    limits = recipe.validation
    return {
        "nodes": {
            "checked": len(nodes),
            "places": sum(check.places for check in nodes),
            "codes_off": sum(check.codes_off for check in nodes),
        },
        "passes": {**asdict(passes), "against": "the same ops in torch"},
        "quality": {
            **asdict(quality),
            "nll_increase": quality.nll_increase,
            "max_nll_increase": limits.max_nll_increase,
            "min_argmax_agreement": limits.min_argmax_agreement,
            "against": "the model at full precision, on held-out built-in problems",
        },
        "layers": errors,
    }


def _faults(recipe: Recipe, nodes: list[NodeCheck], passes: PassCheck, quality: Quality) -> list[str]:
    limits = recipe.validation
    faults = [f"node {check.node} ({check.op}) differs from its reference" for check in nodes if not check.passed]
    if not passes.passed:
        faults.append(
            f"ONNX Runtime parts from torch: {passes.not_finite} values are not finite, {passes.place} differs by "
            f"{passes.largest:.2g} (tolerance {passes.tolerance:.2g}), best ids agree in {passes.free_agreement:.4f}"
        )
    if not quality.nll_increase <= limits.max_nll_increase:
        faults.append(
            f"masked NLL rose by {quality.nll_increase:.4f} nats, "
            f"validation.max_nll_increase is {limits.max_nll_increase}"
        )
    if not quality.agreement >= limits.min_argmax_agreement:
        faults.append(
            f"the best id agrees with full precision in {quality.agreement:.4f} of {quality.tokens} masked positions, "
            f"validation.min_argmax_agreement is {limits.min_argmax_agreement}"
        )
    return faults
