"""How far the hidden state moves from full precision, denoising step by denoising step.

    MSE of step s = mean over samples, rows of the canvas and channels of (h_candidate - h_reference)^2

free: both generate by themselves, so canvases may part. forced: the candidate sees the canvases of the reference, so
only its own error of one pass counts. The hidden state is the final norm's output over all rows of the canvas.
Beside it, at each step: how many tokens agree.
Shape letters: B batch, Q query rows, R head rows, D hidden.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from torch import Tensor

from pipeline.backends.backend import Feeds, FullPasses, Ids, Record
from pipeline.metrics.probe import Probe
from pipeline.metrics.sums import Sums
from pipeline.runner import GenerateOptions, Settings, Step, generate

Place = tuple[int, int]  # sample, and step from 1


@dataclass(frozen=True, kw_only=True)
class Steps:
    """Squared errors by sample: over all steps, and at each; `power` has the squares of the reference's hidden state.

    A sample weighs rows x D at each step that it has, nothing at others.
    """

    total: Sums
    by_step: tuple[Sums, ...]
    power: tuple[Sums, ...]


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """By step, before its pass, and by sample.

    `free`: of the generated positions, those that hold the same on both canvases, at steps that both runs took.
    `forced`: of the masked positions of the reference's canvas, those for which both find the same token likeliest.
    """

    free: tuple[Sums, ...]
    forced: tuple[Sums, ...]


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """`free` has only the steps that both runs took."""

    free: Steps
    forced: Steps
    tokens: Tokens


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """A sample's rows in one pass, padding left out; `best` is the likeliest id of row r, or of the next if shifted."""

    hidden: Tensor  # [Q, D]
    ids: Ids  # [Q]
    best: Ids  # [Q]


@dataclass(kw_only=True)
class _Pass:
    """One pass of a generation over all rows of its canvases, and which (sample, step) each of them was."""

    feeds: Feeds
    hidden: Tensor  # [B, Q, D]
    best: Ids  # [B, Q]
    places: list[Place] = field(default_factory=list)

    @classmethod
    def of(cls, probe: Probe, feeds: Feeds, places: list[Place]) -> tuple["_Pass", Record]:
        """What `probe` makes of `feeds`, whose head rows are all rows."""
        seen = probe.observe(feeds)
        return cls(feeds=feeds, hidden=seen.hidden, best=seen.record.top_ids[..., 0], places=places), seen.record

    def split(self) -> Iterator[tuple[Place, _Rows]]:
        """Each sample's rows."""
        rows = zip(self.places, self.hidden, self.feeds.input_ids, self.best, self.feeds.kv_len.tolist(), strict=True)
        for place, hidden, ids, best, length in rows:
            yield place, _Rows(hidden=hidden[:length], ids=ids[:length], best=best[:length])


class _Recorder(FullPasses):
    """A session that asks the probe for all rows, answers with those that were wanted, and keeps every pass."""

    def __init__(self, probe: Probe) -> None:
        self.probe, self.top_k = probe, probe.top_k
        self.passes: list[_Pass] = []
        self.taken: dict[int, int] = {}

    def full_pass(self, feeds: Feeds) -> Record:
        whole = replace(feeds, head_index=feeds.position_ids)
        found, record = _Pass.of(self.probe, whole, [])
        self.passes.append(found)
        return chosen_rows(record, feeds.head_index)

    def watch(self, step: Step) -> None:
        """The loop reports the rows of a pass in their order."""
        self.taken[step.request] = self.taken.get(step.request, 0) + 1
        self.passes[-1].places.append((step.request, self.taken[step.request]))

    def close(self) -> None:
        self.probe.close()


@dataclass
class _Errors:
    """(sample, step) -> squared error, square of the reference, number of values."""

    found: dict[Place, tuple[float, float, int]] = field(default_factory=dict)

    def add(self, place: Place, reference: Tensor, candidate: Tensor) -> None:
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


@dataclass
class _Counts:
    """(sample, step) -> how many of how many."""

    found: dict[Place, tuple[int, int]] = field(default_factory=dict)

    def steps(self, count: int) -> tuple[Sums, ...]:
        last = max(step for _, step in self.found)
        values, weights = np.zeros((2, count, last))
        for (sample, step), (number, of) in self.found.items():
            values[sample, step - 1], weights[sample, step - 1] = number, of
        return tuple(_sums(values[:, step], weights[:, step]) for step in range(last))


class _Comparison:
    """Adds up everything about two runs, pass by pass; `starts` of the generated region by sample."""

    def __init__(self, settings: Settings, starts: Sequence[int]) -> None:
        self.settings, self.starts = settings, starts
        self.free, self.forced = _Errors(), _Errors()
        self.same, self.agreed = _Counts(), _Counts()

    def add(self, place: Place, exact: _Rows, forced: _Rows, own: _Rows | None) -> None:
        """A pass of the reference's run, the candidate on the same canvas, and its own pass of that step."""
        start = self.starts[place[0]]  # a mask id that stands in the prompt is not to be generated
        masked = start + np.flatnonzero(exact.ids[start:] == self.settings.mask_id)
        rows = np.maximum(masked - int(self.settings.shifted_logits), 0)
        self.agreed.found[place] = int((exact.best[rows] == forced.best[rows]).sum()), len(rows)
        self.forced.add(place, exact.hidden, forced.hidden)
        if own is not None:
            same = exact.ids[start:] == own.ids[start:]
            self.same.found[place] = int(same.sum()), len(same)
            self.free.add(place, exact.hidden, own.hidden)

    def result(self) -> Trajectory:
        count = len(self.starts)
        return Trajectory(
            free=self.free.steps(count),
            forced=self.forced.steps(count),
            tokens=Tokens(free=self.same.steps(count), forced=self.agreed.steps(count)),
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
    compared = _Comparison(settings, [len(prompt) for prompt in prompts])
    for first in range(0, len(prompts), batch_size):
        numbers = range(first, min(first + batch_size, len(prompts)))
        expected = _recorded(reference, settings, prompts, numbers, options)
        found = {
            place: rows
            for each in _recorded(candidate, settings, prompts, numbers, options)
            for place, rows in each.split()
        }
        for each in expected:
            forced, _ = _Pass.of(candidate, each.feeds, each.places)
            for (place, exact), (_, moved) in zip(each.split(), forced.split(), strict=True):
                compared.add(place, exact, moved, found.get(place))
    return compared.result()


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
