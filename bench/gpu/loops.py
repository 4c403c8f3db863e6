"""The complete denoising loop: tokens per second of both models on the same fixed schedule."""

import time

import torch

from bench.gpu.baseline import Bf16Model
from bench.gpu.contenders import DoesNotFitError, make_room
from bench.gpu.loop import Loop, Schedule
from bench.gpu.machine import Machine
from bench.gpu.operands import Draws
from bench.gpu.quantized import QuantizedModel
from bench.gpu.section import Plan, Row, Section
from bench.gpu.shapes import BLOCK_ROWS, CANVASES, ModelShape
from bench.gpu.timing import Times, paired
from bench.gpu.whole_models import items_of

GENERATED = 256
STEPS_A_BLOCK = 8
REPEATS = 5


def schedules(tiny: bool) -> tuple[Schedule, ...]:
    """One a canvas."""
    if tiny:
        return (Schedule(canvas=48, generated=16, block=8, steps=4),)
    return tuple(
        Schedule(canvas=canvas, generated=GENERATED, block=BLOCK_ROWS, steps=STEPS_A_BLOCK) for canvas in CANVASES
    )


def _seconds(machine: Machine, loop: Loop, draws: Draws) -> float:
    """Wall time from a canvas of masks to one without, the host included."""
    schedule, mask_id = loop.schedule, loop.model.shape.mask_id
    loop.begin(draws.integers(0, mask_id - 1, schedule.prompt, dtype=torch.int64))
    machine.synchronize()
    start = time.perf_counter()
    loop.run()
    machine.synchronize()
    seconds = time.perf_counter() - start
    left = int((loop.ids == mask_id).sum())
    assert left == 0, f"{left} masks are left"
    return seconds


def time_loops(machine: Machine, loops: dict[str, Loop], seed: int) -> Row:
    """Tokens per second, the models in turn with the same prompts."""
    schedule = loops["bf16"].schedule
    for loop in loops.values():
        _seconds(machine, loop, Draws(machine.device, seed))
    found: dict[str, list[float]] = {name: [] for name in loops}
    for number in range(1 if machine.emulated else REPEATS):
        for name in sorted(loops, reverse=bool(number % 2)):
            found[name].append(_seconds(machine, loops[name], Draws(machine.device, seed + number)))
    times = {name: Times([1e3 * s for s in seconds]) for name, seconds in found.items()}
    rates = {name: {"tokens_per_s": 1e3 * schedule.generated / t.median, **t.as_json()} for name, t in times.items()}
    return {"schedule": vars(schedule), **rates, **paired(times["bf16"], times["ours"])}


def measure_loops(plan: Plan, shape: ModelShape, method: str, seed: int) -> Row:
    """Every canvas, cached and uncached; void where both models do not fit."""
    machine = plan.machine
    try:
        make_room(machine, shape)
    except DoesNotFitError as reason:
        return {"void": str(reason)}
    draws = Draws(machine.device, seed)
    models = {
        "bf16": Bf16Model(shape, machine, draws),
        "ours": QuantizedModel(shape, machine, machine.load(False), draws, method),
    }
    row: Row = {}
    for schedule in schedules(machine.emulated):
        for model in models.values():
            model.allocate(schedule.canvas)
        for cached in (True, False):
            loops = {name: Loop(machine, model, schedule, cached) for name, model in models.items()}
            name = f"canvas {schedule.canvas} {'cached' if cached else 'uncached'}"
            row[name] = time_loops(machine, loops, seed)
    return row


def _said(row: Row) -> str:
    if "void" in row:
        return str(row["void"])
    return ", ".join(
        f"{name} {found['bf16']['tokens_per_s']:.0f} -> {found['ours']['tokens_per_s']:.0f} tokens/s"
        for name, found in row.items()
        if name.startswith("canvas")
    )


LOOPS = Section(
    name="loops",
    about="the complete denoising loop, tokens per second",
    items=items_of(measure_loops),
    said=_said,
    slowest_s=150.0,
)
