"""One generation over many prompts: what was written and when, which is all that two of them are compared by."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.backends.backend import Ids, Session
from pipeline.runner import GenerateOptions, Settings, Step, generate


@dataclass(frozen=True, kw_only=True)
class FreeRun:
    """By prompt: the ids of the generated region, the step (from 1) that wrote each, and the forward passes it took."""

    ids: tuple[tuple[int, ...], ...]
    steps: tuple[tuple[int, ...], ...]
    nfe: tuple[int, ...]

    @classmethod
    def of_json(cls, content: Mapping[str, Any]) -> "FreeRun":
        """The inverse of `as_json`."""
        ids, steps = (tuple(tuple(row) for row in content[name]) for name in ("ids", "steps"))
        return cls(ids=ids, steps=steps, nfe=tuple(content["nfe"]))


def free_run(
    session: Session,
    settings: Settings,
    prompts: Sequence[Sequence[int]],
    options: GenerateOptions,
    *,
    batch_size: int = 32,
) -> FreeRun:
    """Generate from every prompt; draws are keyed by its place in `prompts`."""
    written: list[Ids] = [np.zeros(options.gen_length, np.int64) for _ in prompts]
    taken = [0] * len(prompts)

    def watch(step: Step) -> None:
        taken[step.request] += 1
        # Whatever an end-of-text fills behind itself is of this step, too.
        new = (step.region != settings.mask_id) & (written[step.request] == 0)
        written[step.request][new] = taken[step.request]

    results = generate(session, settings, prompts, options, on_step=watch, batch_size=batch_size)
    return FreeRun(
        ids=tuple(tuple(result.region) for result in results),
        steps=tuple(tuple(steps.tolist()) for steps in written),
        nfe=tuple(result.nfe for result in results),
    )
