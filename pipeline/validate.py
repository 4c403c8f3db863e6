"""Stage validate: prove the ONNX model, fail closed, write validation.json and golden/."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from passes.base import run
from passes.invariants import check_quantized
from passes.widen_floats import WidenFloats
from pipeline.backends.backend import Feeds, Session
from pipeline.backends.eager import EagerSession
from pipeline.backends.guided import open_guided
from pipeline.backends.ort import open_session
from pipeline.backends.score import open_score
from pipeline.calibration.states import States, builtin_corpus, noised_states
from pipeline.capture import materialise
from pipeline.errors import UsageFault, ValidationFailed
from pipeline.folder import GOLDEN, GUIDED, MODEL, SCORE, VALIDATION, write_json
from pipeline.lower import lowered_graph, simulated_graph
from pipeline.models.checkpoint import Checkpoint
from pipeline.quantize import Weights
from pipeline.recipe import Recipe, linear_names
from pipeline.runner.settings import Settings
from pipeline.validation.cached import CacheCheck, check_cache
from pipeline.validation.endings import EndingCheck, check_guided, check_scores
from pipeline.validation.feeds import SWEEP_NOISE, scored_batches, sweep, unbanned
from pipeline.validation.forced import ForcedModel
from pipeline.validation.golden import write_golden
from pipeline.validation.layers import site_errors
from pipeline.validation.nodes import NodeCheck, check_nodes
from pipeline.validation.passes import PassCheck, check_passes
from pipeline.validation.quality import Quality, compare
from pipeline.validation.reference import records

BATCH = 4  # a batch's logits are held several times over, and a vocabulary has 10^5 rows
LAYER_SAMPLES = 16
WORST_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class Proof:
    """All that was compared, before it is judged."""

    nodes: list[NodeCheck]
    passes: PassCheck
    cache: CacheCheck
    endings: Mapping[str, EndingCheck]
    quality: Quality


def torch_session(checkpoint: Checkpoint, recipe: Recipe, weights: Weights, *, lowered: bool) -> EagerSession:
    """The whole quantised model in torch: simulated, or as the references of the ops that were exported."""
    if lowered:
        graph = lowered_graph(checkpoint.config, recipe, weights.numbers)
    else:
        graph = simulated_graph(checkpoint.config, recipe, weights.numbers)
        run(graph, [WidenFloats()], check_quantized)
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
    settings = settings_of(checkpoint, recipe, tokenizer)
    weights = Weights(work / "weights")
    candidate = open_session(work / MODEL, threads=recipe.threads)
    reference = torch_session(checkpoint, recipe, weights, lowered=True)
    feeds = list(sweep(settings, recipe.validation.seed))
    graph = reference.graph
    assert isinstance(graph, torch.fx.GraphModule)
    nodes = check_nodes(work / MODEL, graph, node_passes(feeds), threads=recipe.threads)
    forced = ForcedModel(work / MODEL, graph, longest(feeds), threads=recipe.threads)
    passes = check_passes(reference, candidate, forced, feeds, on_pass=on_pass)
    cache = check_cache(candidate, settings, recipe.validation.seed)
    endings = check_endings(work, candidate, recipe, settings, node_passes(feeds))
    states = measurement_states(checkpoint, recipe, tokenizer)
    scored = list(scored_batches(settings, states, BATCH))
    canvases = zip(states.batches(BATCH), (batch.feeds for batch in scored), strict=True)
    exact = records(checkpoint, list(canvases), top_k=settings.top_k)
    quality = compare(exact, candidate, scored, unbanned(settings))
    proof = Proof(nodes=nodes, passes=passes, cache=cache, endings=endings, quality=quality)
    errors = site_errors(checkpoint, recipe, weights, next(states.batches(LAYER_SAMPLES)))
    report = _report(recipe, proof, errors)
    if faults := _faults(recipe, proof):
        raise ValidationFailed(
            f"{'; '.join(faults)}; nothing was published. {_advice(checkpoint, recipe, errors)}publish it unvalidated "
            "with --validate off"
        )
    write_golden(work / GOLDEN, candidate, graph, settings, recipe.validation.seed)
    write_json(work / VALIDATION, report)
    return report


def check_endings(
    work: Path, exported: Session, recipe: Recipe, settings: Settings, feeds: Sequence[Feeds]
) -> dict[str, EndingCheck]:
    """The graphs beside model.onnx, by file name."""
    scorer, seed = open_score(work / SCORE, threads=recipe.threads), recipe.validation.seed
    checks = {SCORE: check_scores(exported, scorer, settings, feeds, seed)}
    if recipe.lowering.guidance:
        guided = open_guided(work / GUIDED, threads=recipe.threads)
        checks[GUIDED] = check_guided(guided, scorer, settings, feeds, seed)
    return checks


def settings_of(checkpoint: Checkpoint, recipe: Recipe, tokenizer: Tokenizer) -> Settings:
    """What the bundle's runner will know; raises UsageFault when the record cannot hold `top_k` ids that are meant."""
    limit = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    settings = Settings.of_model(checkpoint.config, top_k=recipe.lowering.top_k)
    settings = replace(settings, vocab_size=min(settings.vocab_size, limit))
    if settings.top_k > unbanned(settings):
        raise UsageFault(
            f"lowering.top_k is {settings.top_k}, but only {unbanned(settings)} ids of this model have a token other "
            f"than the mask; pass --set lowering.top_k={unbanned(settings)} or less"
        )
    return settings


def longest(feeds: Sequence[Feeds]) -> list[Feeds]:
    """The passes of the sweep with the most rows, one of each noise level."""
    size = max(one.input_ids.size for one in feeds)
    return [one for one in feeds if one.input_ids.size == size]


def node_passes(feeds: Sequence[Feeds]) -> list[Feeds]:
    """Three passes of the sweep: the shortest and the longest all masked, and one between half masked."""
    by_size = sorted(feeds, key=lambda one: one.input_ids.size)  # stable, so noise rises within a size
    batches = [one for one in by_size if len(one.kv_len) == len(by_size[-1].kv_len)]
    levels = len(SWEEP_NOISE)
    middle = [one for one in batches if one.input_ids.size < batches[-1].input_ids.size][-levels:] or batches[-levels:]
    return [by_size[levels - 1], middle[levels // 2], by_size[-1]]


def _advice(checkpoint: Checkpoint, recipe: Recipe, errors: dict[str, float]) -> str:
    """What moved most, and the settings that would keep it; a float export has none, it is wrong or judged too hard."""
    if recipe.method == "none":
        return ""
    worst = list(errors.items())[:WORST_SHOWN]
    blocks = [name for name in linear_names(checkpoint.config) if recipe.linear.w_bits < 16 and not recipe.skips(name)]
    patterns = [pattern for site, _ in worst for pattern in (site, f"{site}.*")]  # a linear, or a whole block
    kept = [pattern for pattern in patterns if any(fnmatchcase(name, pattern) for name in blocks)]
    sets = ["--set head.bits=16"] if worst[0][0] == "head" and recipe.head.bits < 16 else []
    if kept:
        sets.append(f"--set 'skip=[{', '.join((*recipe.skip, *kept))}]'")
    moved = ", ".join(f"{site} ({error:.2g})" for site, error in worst)
    keep = f"keep them at 16 bits with {' '.join(sets)}, " if sets else ""
    return f"Parts whose output moved most (relative squared error): {moved}; {keep}choose a recipe with more bits, or "


def _report(recipe: Recipe, proof: Proof, errors: dict[str, float]) -> dict[str, Any]:
    limits, nodes, quality = recipe.validation, proof.nodes, proof.quality
    return {
        "nodes": {
            "checked": len(nodes),
            "places": sum(check.places for check in nodes),
            "codes_off": sum(check.codes_off for check in nodes),
        },
        "passes": {
            **asdict(proof.passes),
            "min_free_agreement": limits.min_free_agreement,
            "against": "the same ops in torch",
        },
        "cache": {**asdict(proof.cache), "against": "full passes on equal ids"},
        "endings": {
            name: {**asdict(check), "against": "the exported graph's rows of logits, in torch"}
            for name, check in proof.endings.items()
        },
        "quality": {
            **asdict(quality),
            "nll_increase": quality.nll_increase,
            "max_nll_increase": limits.max_nll_increase,
            "min_argmax_agreement": limits.min_argmax_agreement,
            "against": "the model at full precision, on held-out built-in problems",
        },
        "layers": errors,
    }


def _faults(recipe: Recipe, proof: Proof) -> list[str]:
    limits, passes, quality = recipe.validation, proof.passes, proof.quality
    faults = [f"node {check.node} ({check.op}) differs from its reference" for check in proof.nodes if not check.passed]
    if not passes.right:
        faults.append(
            f"ONNX Runtime parts from torch: {passes.not_finite} values are not finite, {passes.place} differs by "
            f"{passes.largest:.2g} (tolerance {passes.tolerance:.2g})"
        )
    if not proof.cache.equal:
        faults.append(
            f"passes over windows differ from those over whole canvases by {proof.cache.largest:.2g} on equal ids, "
            "expected 0"
        )
    faults += [
        f"{name} differs from {MODEL} in {check.differing} ids and logits, in what sums up a row by "
        f"{check.largest:.2g} (tolerance {check.tolerance:.2g})"
        for name, check in proof.endings.items()
        if not check.right
    ]
    if not passes.free_agreement >= limits.min_free_agreement:
        faults.append(
            f"best ids of ONNX Runtime and torch agree in {passes.free_agreement:.4f} of {passes.rows} random rows, "
            f"validation.min_free_agreement is {limits.min_free_agreement}"
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
