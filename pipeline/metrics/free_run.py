"""One generation over many prompts: what was written and when, which is all that two of them are compared by."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline.backends.backend import Session
from pipeline.runner import GenerateOptions, Settings, generate


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
    """Generate from every prompt, without a cache since torch has none; draws are keyed by its place in `prompts`."""
    results = generate(session, settings, prompts, replace(options, exact=True), batch_size=batch_size)
    return FreeRun(
        ids=tuple(tuple(result.region) for result in results),
        # Whatever an end-of-text fills behind itself is of the last step.
        steps=tuple(tuple(step or result.nfe for step in result.step_map) for result in results),
        nfe=tuple(result.nfe for result in results),
    )
