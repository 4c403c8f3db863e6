"""The loop of captured steps equals a plain loop, and without a cache the runner's own."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bench.gpu.baseline import Bf16Model
from bench.gpu.loop import Loop, Schedule
from bench.gpu.machine import Machine
from bench.gpu.model import Model
from bench.gpu.operands import Draws
from bench.gpu.quantized import QuantizedModel
from bench.gpu.shapes import TINY_DREAM, TINY_LLADA, ModelShape
from pipeline.backends.backend import Feeds, FullPasses, Record
from pipeline.runner import GenerateOptions, Settings, generate

SCHEDULE = Schedule(canvas=40, generated=24, block=8, steps=4)


def model_of(shape: ModelShape, machine: Machine, kind: str) -> Model:
    draws = Draws(machine.device, 11)
    if kind == "bf16":
        model: Model = Bf16Model(shape, machine, draws)
    else:
        model = QuantizedModel(shape, machine, machine.load(True), draws, kind)
    model.allocate(SCHEDULE.canvas)
    return model


def plain_loop(model: Model, prompt: list[int], schedule: Schedule, cached: bool) -> list[int]:
    """Lists and Python numbers, one position after the other."""
    mask, shift = model.shape.mask_id, int(model.shape.shifted)
    canvas = [*prompt, *[mask] * schedule.generated]
    for start in range(schedule.prompt, schedule.canvas, schedule.block):
        for step in range(schedule.steps):
            end = start + schedule.block
            first, last = (start - shift, end) if cached and step else (0, schedule.canvas)
            rows = torch.tensor([position - shift - first for position in range(start, end)])
            found = model(torch.tensor(canvas[first:last]), torch.arange(first, last), rows)
            masked = [(float(found.tail[i]), i) for i in range(schedule.block) if canvas[start + i] == mask]
            for _, i in sorted(masked)[: schedule.block // schedule.steps]:
                canvas[start + i] = int(found.ids[i])
    return canvas


def prompt_of(shape: ModelShape) -> Tensor:
    return torch.arange(SCHEDULE.prompt) * 5 % (shape.mask_id - 1)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("kind", ["bf16", "star", "rtn"])
@pytest.mark.parametrize("shape", [TINY_LLADA, TINY_DREAM], ids=lambda shape: shape.name)
def test_equals_a_plain_loop(shape: ModelShape, kind: str, cached: bool, simulated: Machine) -> None:
    model, prompt = model_of(shape, simulated, kind), prompt_of(shape)
    loop = Loop(simulated, model, SCHEDULE, cached)
    loop.begin(prompt)
    loop.run()
    expected = plain_loop(model, prompt.tolist(), SCHEDULE, cached)
    assert loop.ids.tolist() == expected
    assert shape.mask_id not in expected
    loop.begin(prompt)
    loop.run()
    assert loop.ids.tolist() == expected, "a second run starts from nothing of the first"


def test_the_cache_is_stale_between_full_passes(simulated: Machine) -> None:
    """Else cached and uncached would be the same loop, and the test above would say less."""
    model, prompt = model_of(TINY_LLADA, simulated, "star"), prompt_of(TINY_LLADA)
    assert plain_loop(model, prompt.tolist(), SCHEDULE, True) != plain_loop(model, prompt.tolist(), SCHEDULE, False)


class _Session(FullPasses):
    """The measured model as the runner sees one."""

    top_k = 1

    def __init__(self, model: Model) -> None:
        self.model = model

    def full_pass(self, feeds: Feeds) -> Record:
        ids, positions, rows = (
            torch.from_numpy(array[0]) for array in (feeds.input_ids, feeds.position_ids, feeds.head_index)
        )
        found = self.model(ids, positions, rows)
        nothing = np.zeros((1, len(rows)), dtype=np.float32)
        return Record(
            top_ids=found.ids[None, :, None].numpy(),
            top_logits=nothing[..., None],
            tail=found.tail[None].numpy(),
            neg_entropy=found.neg_entropy[None].numpy(),
            lse_t=nothing,
        )

    def close(self) -> None:
        pass


@pytest.mark.parametrize("shape", [TINY_LLADA, TINY_DREAM], ids=lambda shape: shape.name)
def test_equals_the_runner_without_a_cache(shape: ModelShape, simulated: Machine) -> None:
    schedule = Schedule(canvas=48, generated=32, block=8, steps=4)  # a length that the runner does not pad
    model = model_of(shape, simulated, "star")
    model.allocate(schedule.canvas)
    prompt = (torch.arange(schedule.prompt) * 5 % (shape.mask_id - 1)).tolist()
    loop = Loop(simulated, model, schedule, cached=False)
    loop.begin(torch.tensor(prompt))
    loop.run()
    known: dict[str, Any] = {"mask_id": shape.mask_id, "shifted_logits": shape.shifted, "top_k": 1}
    known |= {"vocab_size": shape.vocabulary, "embedding_size": shape.vocabulary, "max_length": 64}
    options = GenerateOptions(gen_length=32, block_length=8, steps=16, policy="quota")
    # The measured loop has no early end, so no id may count as one.
    settings = Settings(eos_id=shape.vocabulary, pad_id=0, **known)
    [result] = generate(_Session(model), settings, [prompt], options)
    assert loop.ids[schedule.prompt :].tolist() == result.region


@pytest.mark.parametrize(
    ("generated", "block", "steps"), [(20, 8, 4), (24, 8, 3), (40, 8, 4)], ids=["block", "steps", "no prompt"]
)
def test_a_schedule_divides(generated: int, block: int, steps: int) -> None:
    with pytest.raises(ValueError, match="does not divide"):
        Schedule(canvas=40, generated=generated, block=block, steps=steps).check()
