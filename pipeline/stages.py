"""The road on one page: calibrate, quantize, lower, validate, build, bundle, in this order, each on what came before.

Every stage works in `DIR.work` and is remembered there with a fingerprint of all it was made from, so a repeated
command goes on where the last one stopped. `DIR` appears by one rename at the end.
"""

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch
from safetensors.torch import save_file

from passes.methods import METHODS
from passes.options import Options
from pipeline.accounting import gate_shares, take_account
from pipeline.bundle import BundleParts, bundle
from pipeline.calibrate import collect_stats
from pipeline.calibration.corpus import calibration_states
from pipeline.calibration.sources import source_digest
from pipeline.calibration.states import States
from pipeline.calibration.stream import Means
from pipeline.capture import pieces
from pipeline.costs import run_time_costs
from pipeline.errors import UsageFault
from pipeline.fingerprint import code_digest, digest_of, model_digest
from pipeline.folder import GOLDEN, MODEL, STAGES, VALIDATION, WorkFolder, os_faults
from pipeline.licence import Licence, read_licence
from pipeline.lower import simulated_graph, write_onnx
from pipeline.models import lasting_name, resolve
from pipeline.models.checkpoint import Checkpoint, open_checkpoint
from pipeline.models.tokenizer import TokenizerSource, read_tokenizer
from pipeline.progress import Progress, Stage
from pipeline.quantize import Weights, check_format, quant_plan, write_weights
from pipeline.recipe import Recipe
from pipeline.recipe_file import dump_recipe
from pipeline.validate import settings_of
from pipeline.validate import validate as prove
from pipeline.version import VERSION

STATS = "stats.safetensors"
WEIGHTS = "weights"
CACHE = "cache"


@dataclass(frozen=True, kw_only=True)
class Job:
    """All that a stage may read besides the files of the stages before it."""

    source: str
    checkpoint: Checkpoint
    tokenizer: TokenizerSource
    recipe: Recipe
    work: WorkFolder
    validated: bool
    licence: Licence
    means: Means


def calibrate(job: Job, stage: Stage) -> list[str]:
    """Canvases through the float model, block by block: moments of every linear's input."""
    part = job.recipe.calibration
    count = stage.counter(len(pieces(job.checkpoint.config)), "pieces")
    stats = collect_stats(job.checkpoint, _states(job), num_buckets=part.noise_buckets, means=job.means, on_piece=count)
    save_file(stats.tensors(), job.work.path / STATS)
    need = "" if METHODS[job.recipe.method].needs_calibration else f"; method {job.recipe.method} does not need them"
    stage.finish(f"moments of {len(stats.table)} site states from {part.samples} canvases{need}")
    return [STATS]


def quantize(job: Job, stage: Stage) -> list[str]:
    """The method's passes on every piece with its real weights, into sidecar files."""
    folder = job.work.path / WEIGHTS
    count = stage.counter(len(pieces(job.checkpoint.config)), "pieces")
    states = _states(job) if METHODS[job.recipe.method].needs_calibration else None
    ends: list[float] = []  # of pieces, of which only the first is no block

    def on_piece(name: str) -> None:
        ends.append(time.monotonic())
        count(name)

    changed = write_weights(job.checkpoint, job.recipe, folder, states=states, means=job.means, on_piece=on_piece)
    block_seconds = median(end - begin for begin, end in pairwise(ends))
    weights = Weights(folder)
    account = take_account(job.checkpoint, job.recipe, weights)
    total = account.linears_quantised + account.linears_kept
    learned = f"; {block_seconds:.1f} s a block; {_learned(job, states, weights)}" if states else ""
    remarks = f"{_gated(job, weights)}{_compensated(weights)}"
    stage.finish(
        f"{account.linears_quantised} of {total} linears quantised, {account.linears_kept} kept at 16 bits; "
        f"{account.tensors_used} of {account.tensors_total} tensors used{learned}{remarks}",
        passes=changed,
        block_seconds=block_seconds,
    )
    return sorted(path.relative_to(job.work.path).as_posix() for path in folder.glob("*.safetensors"))


def _learned(job: Job, states: States, weights: Weights) -> str:
    """How many rows there were, and how to have more where Hessians are left singular."""
    rows, samples = int(states.kv_len.sum()), job.recipe.calibration.samples
    codes = [name for name in weights.names if name.startswith("blocks.") and name.endswith(".codes")]
    channels = max((weights.shape(name)[-1] for name in codes), default=0)
    if rows >= channels or not METHODS[job.recipe.method].solves_with_hessians(
        quant_plan(job.recipe, job.checkpoint.config)
    ):
        return f"learned from {rows:,} rows"
    enough = -(-samples * channels // rows)
    return f"learned from {rows:,} rows for {channels:,} channels: more with --set calibration.samples={enough}"


def _gated(job: Job, weights: Weights) -> str:
    """What a gate takes in whole slices of a tile may be more than the recipe asks for."""
    linears: dict[Fraction, list[str]] = {}
    recipe = job.recipe
    asked = {"freeact": recipe.freeact.share, "star": recipe.star.share if recipe.star.gate else None}
    if (share := asked.get(recipe.method)) is not None:
        for name, taken in gate_shares(weights, share).items():
            linears.setdefault(taken, []).append(name)
    parts = [f"{share} of the input channels of {', '.join(names)}" for share, names in sorted(linears.items())]
    if len(linears) == 1:
        parts = [f"{share} of the input channels" for share in linears]
    return f"; gates keep for each state {' and '.join(parts)}" if parts else ""


def _compensated(weights: Weights) -> str:
    """Where compensation leaves less of the error of attention's output on canvases that it was not learned from."""
    shares = {name.removesuffix(".attn.o_proj.tac"): x for name, x in weights.numbers.items() if name.endswith(".tac")}
    if not shares:
        return ""
    same = sorted((name for name, share in shares.items() if share >= 1), key=lambda name: int(name.split(".")[1]))
    where = f", identity at {', '.join(same)}" if same else ""
    lowered = f"{len(shares) - len(same)} of {len(shares)}"
    return f"; TAC lowers the held-out error of {lowered} attention outputs{where}"


def lower(job: Job, stage: Stage) -> list[str]:
    """The whole graph to ONNX, weights from the sidecar files."""
    weights = Weights(job.work.path / WEIGHTS)
    count = stage.counter(len(weights.names), "weights")
    nodes = write_onnx(job.checkpoint.config, job.recipe, weights, job.work.path / MODEL, on_weight=count)
    ours = ", ".join(f"{number} {name}" for name, number in sorted(nodes.items())) or "standard ops only"
    stage.finish(f"ONNX opset {job.recipe.lowering.opset}: {ours}{_cost(job, weights)}", nodes=nodes)
    return list(job.recipe.lowering.files)


def _cost(job: Job, weights: Weights) -> str:
    """What stands before the linears at run time, beside what they take themselves."""
    config = job.checkpoint.config
    costs = run_time_costs(simulated_graph(config, job.recipe, weights.numbers), config)
    if not costs.added:
        return ""
    shares = f"{100 * costs.multiply_adds:.2g} % multiply-adds, {100 * costs.parameters:.2g} % parameters"
    return f"; run-time cost of transforms: {shares}"


def validate(job: Job, stage: Stage) -> list[str]:
    """ONNX Runtime against torch, and against full precision; fails closed."""
    for path in [job.work.path / VALIDATION, *(job.work.path / GOLDEN).glob("*.json")]:
        path.unlink(missing_ok=True)
    if not job.validated:
        stage.skip("--validate off, so the bundle will be marked unvalidated")
        return []
    report = prove(
        job.checkpoint,
        job.recipe,
        job.work.path,
        job.tokenizer.parsed(),
        on_pass=lambda done, total: stage.advance(done, total, "passes"),
    )
    quality = report["quality"]
    stage.finish(
        f"{report['nodes']['checked']} nodes equal, argmax agreement {quality['agreement']:.3f} "
        f"(limit {quality['min_argmax_agreement']}), masked NLL {quality['nll_increase']:+.4f} "
        f"(limit {quality['max_nll_increase']})",
        quality=quality,
    )
    return [VALIDATION, *(path.relative_to(job.work.path).as_posix() for path in _golden(job))]


def build(job: Job, stage: Stage) -> list[str]:
    """Engines are made where they run, and only when a target asks for one."""
    stage.skip("the recipe names no engine target; the bundle runs in ONNX Runtime as it is")
    return []


def assemble(job: Job, stage: Stage) -> list[str]:
    """Bundle: every finished file under one manifest."""
    account = take_account(job.checkpoint, job.recipe, Weights(job.work.path / WEIGHTS))
    parts = BundleParts(
        work=job.work.path,
        source=job.source,
        config=job.checkpoint.config,
        recipe=job.recipe,
        tokenizer=job.tokenizer,
        formats=account.formats,
        tensors_used=account.tensors_used,
        tensors_total=account.tensors_total,
        linears_quantised=account.linears_quantised,
        linears_kept=account.linears_kept,
        linears_total=account.linears_quantised + account.linears_kept,
        validated=job.validated,
        licence=job.licence,
    )
    manifest = bundle(parts, job.work.bundle)
    size, fp16 = (sum(getattr(row, key) for row in account.formats) for key in ("size_bytes", "fp16_bytes"))
    stage.finish(
        f"{len(manifest.files)} files, {manifest.size_bytes / 1e6:.2f} MB, weights "
        f"{size / fp16:.1%} of fp16, identity {manifest.identity[:12]}",
        identity=manifest.identity,
    )
    return []


# Keys of the recipe that decide what a stage leaves; the bundle holds the whole recipe.
_METHODS = tuple(field.name for field in fields(Options))
_WEIGHTS = ("threads", "calibration", "method", "linear", "head", "embedding", "attention", "skip", *_METHODS)
READS: dict[str, tuple[str, ...]] = {
    "calibrate": ("threads", "calibration", "method"),
    "quantize": _WEIGHTS,
    "lower": (*_WEIGHTS, "lowering"),
    "validate": (*_WEIGHTS, "lowering", "validation"),
}

ROAD: dict[str, Callable[[Job, Stage], list[str]]] = {
    "calibrate": calibrate,
    "quantize": quantize,
    "lower": lower,
    "validate": validate,
    "build": build,
    "bundle": assemble,
}


def export(
    model: str,
    output: Path,
    recipe: Recipe,
    *,
    first: str | None = None,
    last: str | None = None,
    force: bool = False,
    validate: bool = True,
    workers: int = 1,
    cache_on_disk: bool = False,
    report: Progress,
) -> Path:
    """Run the stages from `first` to `last` (default: all that are not done); returns the bundle, or the work folder.

    `workers` batches are calibrated at a time, each on the recipe's threads; a cache on disk lies in the work folder.
    Raises UsageFault when a stage before `first` has not been done with this model and recipe.
    """
    recipe.check_exportable()
    check_format(recipe)
    checkpoint = open_checkpoint(resolve(model))
    recipe.check_against(checkpoint.config)
    tokenizer, licence = read_tokenizer(checkpoint.folder, checkpoint.config), read_licence(checkpoint.folder)
    settings_of(checkpoint, recipe, tokenizer.parsed())  # refuses a top_k that the ids cannot fill
    torch.set_num_threads(recipe.threads)
    work = WorkFolder(output, force=force, model=checkpoint.folder)
    report.begin(f"dllmc {VERSION}  export {model} -> {output}   recipe {recipe.name}", STAGES)
    with work:
        # Left by a crash before publication; it shares files with the work folder, and a shared file is refused.
        shutil.rmtree(work.bundle, ignore_errors=True)
        job = Job(
            source=model,
            checkpoint=checkpoint,
            tokenizer=tokenizer,
            recipe=recipe,
            work=work,
            validated=validate,
            licence=licence,
            means=Means(workers=workers, folder=work.path / CACHE if cache_on_disk else None),
        )
        start, stop = STAGES.index(first or STAGES[0]), STAGES.index(last or STAGES[-1])
        digest = model_digest(checkpoint)
        for name in STAGES[:start]:
            _require(job, name, digest)
        work.record_job(lasting_name(model, checkpoint.folder), dump_recipe(recipe))
        if force or first:
            work.forget(STAGES[start:])
        for name in STAGES[start : stop + 1]:
            _run(job, name, digest, report)
        return work.publish() if stop == len(STAGES) - 1 else work.path


def _fingerprint(job: Job, name: str, digest: str) -> str:
    """Of all that decides what a stage makes: model, versions, our own code, and its part of the recipe."""
    recipe = job.recipe.model_dump(mode="json")
    settings: list[object] = [code_digest(), name, digest]
    settings.append({key: recipe[key] for key in READS.get(name, recipe)})
    settings.append(source_digest(job.recipe.calibration.source))
    if name in ("validate", "build", "bundle"):
        settings.append(job.validated)
    return digest_of(settings)


def _require(job: Job, name: str, digest: str) -> None:
    if not job.work.is_done(name, _fingerprint(job, name, digest)):
        raise UsageFault(
            f"stage {name} has not been done in {job.work.path} with this model and recipe; "
            f"run `dllmc {name} {job.work.output}` first, or export without --from"
        )


def _run(job: Job, name: str, digest: str, report: Progress) -> None:
    fingerprint = _fingerprint(job, name, digest)
    if job.work.is_done(name, fingerprint):
        report.note(f"{name}: done before, reused")
        return
    model, work = job.checkpoint.folder, job.work.path
    with report.stage(name) as stage, os_faults(f"cannot write in {work}", reads=model, writes=work):
        files = ROAD[name](job, stage)
    if name != "bundle":  # what it leaves is the published folder
        job.work.mark_done(name, fingerprint, files)


def _states(job: Job) -> States:
    """The canvases that statistics and methods learn from."""
    return calibration_states(job.recipe.calibration, job.tokenizer.parsed(), job.checkpoint.config)


def _golden(job: Job) -> list[Path]:
    return sorted((job.work.path / GOLDEN).glob("*.json"))
