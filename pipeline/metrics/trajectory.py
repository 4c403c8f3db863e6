"""How far the hidden state moves from full precision, denoising step by denoising step.

    MSE of step s = mean over samples, rows of the canvas and channels of (h_candidate - h_reference)^2

free: both generate by themselves, so canvases may part. forced: the candidate sees the canvases of the reference, so
only its own error of one pass counts. The hidden state is the final norm's output over all rows of the canvas.
Shape letters: B batch, Q query rows, R head rows, D hidden.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from torch import Tensor

from pipeline.backends.backend import Feeds, Ids, Record
from pipeline.metrics.probe import Probe
from pipeline.metrics.sums import Sums
from pipeline.runner import GenerateOptions, Settings, Step, generate


@dataclass(frozen=True, kw_only=True)
class Steps:
    """Squared errors by sample: over all steps, and at each; `power` has the squares of the reference's hidden state.

    A sample weighs rows x D at each step that it has, nothing at others.
    """

    total: Sums
    by_step: tuple[Sums, ...]
    power: tuple[Sums, ...]


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """`free` has only the steps that both runs took."""

    free: Steps
    forced: Steps


@dataclass(kw_only=True)
class _Pass:
    """One pass of a generation over all rows of its canvases, and which (sample, step) each of them was."""

    feeds: Feeds
    hidden: Tensor  # [B, Q, D]
    places: list[tuple[int, int]] = field(default_factory=list)

    def split(self, hidden: Tensor) -> Iterator[tuple[tuple[int, int], Tensor]]:
        """Each sample's rows of `hidden`, padding left out."""
        for place, rows, length in zip(self.places, hidden, self.feeds.kv_len.tolist(), strict=True):
            yield place, rows[:length]


class _Recorder:
    """A session that asks the probe for all rows, answers with those that were wanted, and keeps every pass."""

    def __init__(self, probe: Probe) -> None:
        self.probe, self.top_k = probe, probe.top_k
        self.passes: list[_Pass] = []
        self.taken: dict[int, int] = {}

    def run(self, feeds: Feeds) -> Record:
        whole = replace(feeds, head_index=feeds.position_ids)
        observation = self.probe.observe(whole)
        self.passes.append(_Pass(feeds=whole, hidden=observation.hidden))
        return chosen_rows(observation.record, feeds.head_index)

    def watch(self, step: Step) -> None:
        """The loop reports the rows of a pass in their order."""
        self.taken[step.request] = self.taken.get(step.request, 0) + 1
        self.passes[-1].places.append((step.request, self.taken[step.request]))

    def close(self) -> None:
        self.probe.close()


@dataclass
class _Errors:
    """(sample, step) -> squared error, square of the reference, number of values."""

    found: dict[tuple[int, int], tuple[float, float, int]] = field(default_factory=dict)

    def add(self, place: tuple[int, int], reference: Tensor, candidate: Tensor) -> None:
        error = (candidate.double() - reference.double()).square().sum()
        self.found[place] = float(error), float(reference.double().square().sum()), reference.numel()

    def steps(self, count: int) -> Steps:
        last = max(step for _, step in self.found)
        error, power, weight = np.zeros((3, count, last))
        for (sample, step), values in self.found.items():
            error[sample, step - 1], power[sample, step - 1], weight[sample, step - 1] = values
        return Steps(
            total=_sums(error.sum(1), weight.sum(1)),
            by_step=tuple(_sums(error[:, step], weight[:, step]) for step in range(last)),
            power=tuple(_sums(power[:, step], weight[:, step]) for step in range(last)),
        )


def trajectory(
    reference: Probe,
    candidate: Probe,
    settings: Settings,
    prompts: Sequence[Sequence[int]],
    options: GenerateOptions,
    *,
    batch_size: int = 8,
) -> Trajectory:
    """Generate from every prompt with both; `batch_size` prompts are in memory with all their hidden states."""
    free, forced = _Errors(), _Errors()
    for first in range(0, len(prompts), batch_size):
        numbers = range(first, min(first + batch_size, len(prompts)))
        expected = _recorded(reference, settings, prompts, numbers, options)
        found = {
            place: rows
            for each in _recorded(candidate, settings, prompts, numbers, options)
            for place, rows in each.split(each.hidden)
        }
        for each in expected:
            seen = candidate.observe(each.feeds).hidden
            pairs = zip(each.split(each.hidden), each.split(seen), strict=True)
            for (place, rows), (_, moved) in pairs:
                forced.add(place, rows, moved)
                if place in found:
                    free.add(place, rows, found[place])
    return Trajectory(free=free.steps(len(prompts)), forced=forced.steps(len(prompts)))


def chosen_rows(record: Record, index: Ids) -> Record:
    """The rows `index` [B, R] of a record that has all of them."""
    rows = {
        name: np.take_along_axis(array, index[..., None] if array.ndim == 3 else index, axis=1)
        for name, array in record.as_dict().items()
    }
    return Record(**rows)


def _recorded(
    probe: Probe, settings: Settings, prompts: Sequence[Sequence[int]], numbers: range, options: GenerateOptions
) -> list[_Pass]:
    recorder = _Recorder(probe)
    generate(
        recorder,
        settings,
        [prompts[number] for number in numbers],
        options,
        request_ids=numbers,
        on_step=recorder.watch,
        batch_size=len(numbers),
    )
    return recorder.passes


def _sums(values: np.ndarray, weights: np.ndarray) -> Sums:
    return Sums(values=tuple(values.tolist()), weights=tuple(weights.tolist()))
