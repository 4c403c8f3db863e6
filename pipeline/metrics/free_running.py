"""Free-running agreement: two models generate from the same prompts; when do they part, and how do they end?"""

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.metrics.free_run import FreeRun
from pipeline.metrics.sums import Sums


@dataclass(frozen=True, kw_only=True)
class FreeRunning:
    """By prompt; `first_divergence` is the first step (from 1) after which the canvases differ, None for never.

    `tokens`: equal ids at the end, over the positions up to the later of both end-of-texts (with it); `identical`: 1
    where all of these are; `steps`: steps before the divergence, over the reference's.
    """

    tokens: Sums
    identical: Sums
    steps: Sums
    first_divergence: tuple[int | None, ...]


def free_running(reference: FreeRun, candidate: FreeRun, eos_id: int) -> FreeRunning:
    """Compare two runs; raises ValueError when they are not of the same prompts and length."""
    if [len(ids) for ids in reference.ids] != [len(ids) for ids in candidate.ids]:
        raise ValueError(f"runs of {len(reference.ids)} and {len(candidate.ids)} prompts, or of other lengths, differ")
    equal, positions, diverged = [], [], []
    for number, (ours, theirs) in enumerate(zip(candidate.ids, reference.ids, strict=True)):
        length = max(_answer_length(ids, eos_id) for ids in (ours, theirs))
        equal.append(sum(a == b for a, b in zip(ours[:length], theirs[:length], strict=True)))
        positions.append(length)
        diverged.append(_first_divergence(reference, candidate, number))
    before = [nfe if step is None else step - 1 for nfe, step in zip(reference.nfe, diverged, strict=True)]
    return FreeRunning(
        tokens=Sums(values=tuple(map(float, equal)), weights=tuple(map(float, positions))),
        identical=Sums.of_shares(a == b for a, b in zip(equal, positions, strict=True)),
        steps=Sums(values=tuple(map(float, before)), weights=tuple(map(float, reference.nfe))),
        first_divergence=tuple(diverged),
    )


def _answer_length(ids: Sequence[int], eos_id: int) -> int:
    return ids.index(eos_id) + 1 if eos_id in ids else len(ids)


def _first_divergence(reference: FreeRun, candidate: FreeRun, number: int) -> int | None:
    """A position that both wrote alike at the same step never tells them apart; any other does when it is written."""
    places = zip(
        reference.ids[number], candidate.ids[number], reference.steps[number], candidate.steps[number], strict=True
    )
    return min((min(r, c) for a, b, r, c in places if (a, r) != (b, c)), default=None)
