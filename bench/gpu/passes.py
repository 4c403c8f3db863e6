"""One block and the whole model: full pass and cached block pass against bf16, with the memory of both.

Shape letters: Q query rows, S cache slots, R head rows.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bench.gpu.baseline import Bf16Model
from bench.gpu.contenders import DoesNotFitError, allocated_bytes, make_room, peak_bytes
from bench.gpu.model import Model, Recorded, size_bytes
from bench.gpu.operands import Draws
from bench.gpu.quantized import QuantizedModel
from bench.gpu.section import Plan, Row, Section
from bench.gpu.shapes import BLOCK_KEYS, BLOCK_ROWS, CANVASES, ModelShape
from bench.gpu.timing import capture, interleaved, paired
from bench.gpu.whole_models import items_of


@dataclass(frozen=True, kw_only=True)
class PassCase:
    """Rows that pass, slots they see."""

    name: str
    rows: int
    slots: int
    head_rows: int


def pass_cases(tiny: bool) -> tuple[PassCase, ...]:
    """Full passes and the cached block pass; the head always sees one block."""
    block = 8 if tiny else BLOCK_ROWS
    full = tuple(
        PassCase(name=f"full {size}", rows=size, slots=size, head_rows=block) for size in ((48,) if tiny else CANVASES)
    )
    keys = 48 if tiny else BLOCK_KEYS
    return (*full, PassCase(name="block", rows=block, slots=keys, head_rows=block))


@dataclass(frozen=True)
class Inputs:
    """Of one pass: ids and slots of the query rows, and which of them reach the head."""

    ids: Tensor
    positions: Tensor
    head_rows: Tensor


def prepare_pass(model: Model, case: PassCase, draws: Draws) -> Inputs:
    """Random inputs, half of them masks, and a filled cache, as nothing may be timed on zeros."""
    shape = model.shape
    model.allocate(case.slots)
    for keys, values in model.cache:
        keys.normal_(generator=draws.generator)
        values.normal_(generator=draws.generator)
    ids = draws.integers(0, shape.vocabulary - 1, case.rows, dtype=torch.int64)
    ids = torch.where(draws.integers(0, 1, case.rows) == 1, shape.mask_id, ids)
    first = (case.slots - case.rows) // 2
    return Inputs(
        ids,
        torch.arange(first, first + case.rows, device=draws.device),
        torch.arange(case.head_rows, device=draws.device) + (case.rows - case.head_rows) // 2,
    )


def whole_pass(model: Model, inputs: Inputs) -> Recorded:
    """Embedding to record."""
    return model(inputs.ids, inputs.positions, inputs.head_rows)


def time_pass(plan: Plan, models: dict[str, Model], case: PassCase, seed: int) -> Row:
    """Both models in CUDA graphs, in turn; `one_block` is the mean of the model's blocks, each with its own weights."""
    machine, whole, blocks = plan.machine, {}, {}
    for name, model in models.items():
        inputs = prepare_pass(model, case, Draws(machine.device, seed))
        state = (inputs.ids == model.shape.mask_id).int()
        x = model.embed(inputs.ids)
        whole[name] = capture(machine, partial(whole_pass, model, inputs))
        blocks[name] = capture(machine, partial(model.blocks, x, inputs.positions, state))
    times, block_times = interleaved(machine, whole, repeat_ms=100.0), interleaved(machine, blocks, repeat_ms=50.0)
    layers = models["bf16"].shape.layers
    return {
        "rows": case.rows,
        "slots": case.slots,
        "head_rows": case.head_rows,
        "bf16": times["bf16"].as_json(),
        "ours": times["ours"].as_json(),
        **paired(times["bf16"], times["ours"]),
        "one_block": {
            "bf16": block_times["bf16"].as_json(layers),
            "ours": block_times["ours"].as_json(layers),
            **paired(block_times["bf16"], block_times["ours"]),
        },
    }


def peaks(plan: Plan, model: Model, base_bytes: int, seed: int) -> dict[str, int]:
    """Peak of every pass; the cache goes again."""
    found = {}
    for case in pass_cases(plan.machine.emulated):
        inputs = prepare_pass(model, case, Draws(plan.machine.device, seed))
        found[case.name] = peak_bytes(plan.machine, base_bytes, partial(whole_pass, model, inputs))
    model.cache.clear()
    return found


def measure_model(plan: Plan, shape: ModelShape, method: str, seed: int) -> Row:
    """Memory of each model as it is made, then the times of both; void where they do not fit."""
    machine = plan.machine
    try:
        make_room(machine, shape)
    except DoesNotFitError as reason:
        return {"void": str(reason)}
    draws, base = Draws(machine.device, seed), allocated_bytes(machine)
    bf16 = Bf16Model(shape, machine, draws)
    weights, peak = {"bf16": bf16.weight_bytes}, {"bf16": peaks(plan, bf16, base, seed)}
    base = allocated_bytes(machine)
    ours = QuantizedModel(shape, machine, machine.load(False), draws, method)
    for bits, name in ((8, "int8 head and embedding"), (16, "int8 head")):
        ours.draw_embedding(draws, bits)
        weights[name], peak[name] = ours.weight_bytes, peaks(plan, ours, base, seed)
    weights["norms, transforms and TAC"] = sum(size_bytes(block["sites"]) for block in ours.weights["blocks"])
    models: dict[str, Model] = {"bf16": bf16, "ours": ours}
    passes = {case.name: time_pass(plan, models, case, seed) for case in pass_cases(machine.emulated)}
    return {"weight_bytes": weights, "peak_bytes": peak, "passes": passes}


def _said(row: Row) -> str:
    if "void" in row:
        return str(row["void"])
    return ", ".join(
        f"{name} {found['bf16']['ms']:.2f} -> {found['ours']['ms']:.2f} ms, {found['ratio']:.2f} x"
        for name, found in row["passes"].items()
    )


PASSES = Section(
    name="passes",
    about="one block and whole models against bf16, memory of both",
    items=items_of(measure_model),
    said=_said,
    slowest_s=200.0,
)
