"""How fast a bundle is on this machine: its passes, the host between them, and what answers cost.

Tokens are counted up to the first end-of-text and the seconds run from the call to the last answer, prefill included.
Cases are measured by turns and the medians over all turns reported, so that a slow minute spoils no single case.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import numpy as np

from pipeline.backends.backend import Cache, Feeds, Record, Session
from pipeline.errors import UsageFault
from pipeline.runner.batch import Decode
from pipeline.runner.loop import Engine
from pipeline.runner.results import Done, Request
from pipeline.runner.settings import GenerateOptions, Settings

DEFINITION = "tokens up to the first end-of-text by wall time, prefill included"
Prompts = Sequence[Sequence[int]]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One way to generate."""

    options: GenerateOptions
    batch_size: int

    def facts(self) -> dict[str, Any]:
        """What tells it from the other cases."""
        names = ("policy", "block_length", "exact")
        return {**{name: getattr(self.options, name) for name in names}, "batch_size": self.batch_size}


@dataclass(frozen=True, kw_only=True)
class Run:
    """One case, once; times in ms, `steps` are turns of the loop, of one or more passes each."""

    full_ms: tuple[float, ...]
    block_ms: tuple[float, ...]
    wall_ms: float
    steps: int
    transfer_bytes: int
    tokens: int
    nfe_full: int
    nfe_block: int

    @property
    def host_ms_per_step(self) -> float:
        """All that is not a pass."""
        return (self.wall_ms - sum(self.full_ms) - sum(self.block_ms)) / self.steps

    @property
    def tokens_per_second(self) -> float:
        return 1e3 * self.tokens / self.wall_ms

    @property
    def tpf(self) -> float:
        """Tokens of a row by the passes that it took part in."""
        return self.tokens / (self.nfe_full + self.nfe_block)


class TimedSession:
    """A session that keeps how long each pass took and what went over the border for it, the cache aside."""

    def __init__(self, inner: Session) -> None:
        self.inner, self.top_k, self.cached = inner, inner.top_k, inner.cached
        self.cache_bytes = 0  # of all caches that were allocated
        self.clear()

    def clear(self) -> None:
        """Forget the passes until now."""
        self.full_ms: list[float] = []
        self.block_ms: list[float] = []
        self.transfer_bytes = 0

    @property
    def guided(self) -> bool:
        return self.inner.guided

    def allocate(self, batch: int, slots: int) -> Cache:
        cache = self.inner.allocate(batch, slots)
        self.cache_bytes += cache.size_bytes
        return cache

    def run(self, feeds: Feeds, cache: Cache | None = None, *, first_row: int = 0) -> Record:
        started = time.perf_counter()
        record = self.inner.run(feeds, cache, first_row=first_row)
        passed = 1e3 * (time.perf_counter() - started)
        (self.full_ms if feeds.write_start is None else self.block_ms).append(passed)
        arrays = (*vars(feeds).values(), *vars(record).values())
        self.transfer_bytes += sum(array.nbytes for array in arrays if array is not None)
        return record

    def close(self) -> None:
        self.inner.close()


def measure(engine: Engine, session: TimedSession, prompts: Prompts, case: Case, decode: Decode | None = None) -> Run:
    """Generate once from every prompt; `session` is the engine's."""
    session.clear()
    requests = [Request(ids=ids, request=number) for number, ids in enumerate(prompts)]
    turns = engine.turns
    started = time.perf_counter()
    events = engine.run(requests, case.options, batch_size=case.batch_size, decode=decode, watched=False)
    results = [event.result for event in events if isinstance(event, Done)]
    wall_ms = 1e3 * (time.perf_counter() - started)
    return Run(
        full_ms=tuple(session.full_ms),
        block_ms=tuple(session.block_ms),
        wall_ms=wall_ms,
        steps=engine.turns - turns,
        transfer_bytes=session.transfer_bytes,
        tokens=sum(len(result.ids) for result in results),
        nfe_full=sum(result.nfe_full for result in results),
        nfe_block=sum(result.nfe_block for result in results),
    )


def summary(case: Case, runs: Sequence[Run]) -> dict[str, Any]:
    """The figures of one case, each the median over its runs; a kind of pass that it never took has None."""

    def over(values: Iterable[float]) -> float | None:
        found = list(values)
        return round(median(found), 4) if found else None

    return {
        **case.facts(),
        "full_pass_ms": over(ms for run in runs for ms in run.full_ms),
        "block_pass_ms": over(ms for run in runs for ms in run.block_ms),
        "host_ms_per_step": over(run.host_ms_per_step for run in runs),
        "transfer_bytes_per_step": over(run.transfer_bytes / run.steps for run in runs),
        "tokens_per_second": over(run.tokens_per_second for run in runs),
        "tpf": over(run.tpf for run in runs),
        "tokens": runs[0].tokens,
        "nfe_full": runs[0].nfe_full,
        "nfe_block": runs[0].nfe_block,
    }


def benchmark(
    engine: Engine,
    prompts: Prompts,
    cases: Sequence[Case],
    *,
    repeats: int = 3,
    decode: Decode | None = None,
    on_run: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """All cases by turns, after one that is not counted; `on_run` gets the runs done and to do.

    `decode` is needed for stop texts. Raises UsageFault for a case that cannot be; all cases are guided or none.
    """
    if not prompts or not cases:
        raise UsageFault("there are no prompts, or no cases, to measure")
    for case in cases:
        case.options.check()
    timed = TimedSession(engine.caches_for(cases[0].options).session)
    watched = Engine(timed, engine.settings, full_logits=engine.full_logits, open_guided=lambda: timed)
    runs: Mapping[int, list[Run]] = {number: [] for number in range(len(cases))}
    done, total = 0, (repeats + 1) * len(cases)
    for turn in range(repeats + 1):
        for number, case in enumerate(cases):
            run = measure(watched, timed, prompts, case, decode)
            if turn > 0:  # the first one allocates
                runs[number].append(run)
            done += 1
            if on_run is not None:
                on_run(done, total)
    return {
        "definition": DEFINITION,
        "repeats": repeats,
        "prompts": len(prompts),
        "prompt_tokens": sum(len(ids) for ids in prompts),
        "cases": [summary(case, runs[number]) for number, case in enumerate(cases)],
        "cache_bytes": timed.cache_bytes,
        "peak_memory_bytes": peak_memory_bytes(),
    }


def cases_of(
    options: GenerateOptions, policies: Sequence[str], block_lengths: Sequence[int], batch_sizes: Sequence[int]
) -> Iterator[Case]:
    """Every combination; the other options are the same for all."""
    for policy in policies or (options.policy,):
        for block_length in block_lengths or (options.block_length,):
            for batch_size in batch_sizes:
                yield Case(options=replace(options, policy=policy, block_length=block_length), batch_size=batch_size)


def random_prompts(settings: Settings, count: int, length: int) -> list[list[int]]:
    """Prompts of ids that stand for text, the same on every machine."""
    special = [settings.mask_id, settings.eos_id, settings.pad_id]
    plain = np.setdiff1d(np.arange(settings.vocab_size), special)
    raw = np.random.Philox(key=[0, 0]).random_raw(count * length).reshape(count, length)
    prompts: list[list[int]] = plain[(raw % np.uint64(len(plain))).astype(np.int64)].tolist()
    return prompts


def peak_memory_bytes() -> int:
    """Most memory that this process ever had resident."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
