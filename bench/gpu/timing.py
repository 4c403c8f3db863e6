"""Times of captured graphs, contenders in turn, so that clocks and temperature favour none."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from bench.gpu.machine import Machine

Replay = Callable[[], None]
ROTATION_BYTES = 512 * 2**20
WARM_UPS = 2


def copies(bytes_each: int, machine: Machine, most: int = 512) -> int:
    """How many equal tensors a timing must rotate over so that no cache helps."""
    return 2 if machine.emulated else min(-(-ROTATION_BYTES // bytes_each), most)


@cache
def _side_stream() -> torch.cuda.Stream:
    """One for all warm-ups, as torch keeps freed memory apart by stream."""
    return torch.cuda.Stream()  # type: ignore[no-untyped-call]


def capture(machine: Machine, body: Callable[[], Any]) -> Replay:
    """The launches of `body` as one CUDA graph; on a CPU the body itself."""
    if machine.emulated:
        body()
        return lambda: (body(), None)[1]
    side = _side_stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            body()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        body()
    return graph.replay


def capture_all(machine: Machine, bodies: Mapping[str, Callable[[], Any]]) -> tuple[dict[str, Replay], dict[str, str]]:
    """Graphs by name, and the reason of each body that a kernel refused."""
    replays, refused = {}, {}

    def attempt(name: str) -> None:
        try:
            replays[name] = capture(machine, bodies[name])
        except ValueError as reason:
            refused[name] = str(reason)

    for name in bodies:
        attempt(name)
    return replays, refused


def elapsed_ms(machine: Machine, replay: Replay, count: int) -> float:
    """Time of one replay in milliseconds, from `count` in a row between two events."""
    if machine.emulated:
        start = time.perf_counter()
        for _ in range(count):
            replay()
        return (time.perf_counter() - start) * 1e3 / count
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    first.record()
    for _ in range(count):
        replay()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last)) / count


@dataclass(frozen=True)
class Times:
    """Milliseconds of one contender, one number a repeat."""

    ms: list[float]

    @property
    def median(self) -> float:
        """The figure to quote."""
        return statistics.median(self.ms)

    def as_json(self, launches: int = 1) -> dict[str, float]:
        """Median and spread, a launch."""
        return {"ms": self.median / launches, "ms_min": min(self.ms) / launches, "ms_max": max(self.ms) / launches}


def interleaved(
    machine: Machine, contenders: Mapping[str, Replay], repeats: int = 7, repeat_ms: float = 10.0
) -> dict[str, Times]:
    """Time all contenders `repeats` times in turn; every repeat replays for about `repeat_ms`."""
    repeats = 1 if machine.emulated else repeats
    counts = {}
    for name, replay in contenders.items():
        replay()
        once = elapsed_ms(machine, replay, 1)
        counts[name] = 1 if machine.emulated else max(1, min(200, round(repeat_ms / max(once, 1e-3))))
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(repeats):
        order = list(contenders) if number % 2 == 0 else list(contenders)[::-1]
        for name in order:
            found[name].append(elapsed_ms(machine, contenders[name], counts[name]))
    return {name: Times(ms) for name, ms in found.items()}


def paired(slow: Times, fast: Times) -> dict[str, float]:
    """Speed of `fast` over `slow`, taken within each repeat: median and spread."""
    ratios = [a / b for a, b in zip(slow.ms, fast.ms, strict=True)]
    return {"ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios)}
