"""How many commits a step owes, and which rows of the batch go through a session in one call. Shape letter: B batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pipeline.backends.backend import Ids

BRIDGE = 2  # idle rows that may stand between two rows of one block pass: computing them beats a second call


def steps_of_block(total: int, before: int, after: int, count: int) -> int:
    """A block's share of `total` steps: its masks are `before` .. `after` of the canvas's `count`.

    Equal to LLaDA's schedule where steps divide (arXiv 2502.09992, algorithm 5).
    """
    return max(1, total * after // count - total * before // count)


def quotas(masks: Ids, steps: Ids, step: Ids) -> Ids:
    """Least commits of a step: m // T + [step < m mod T], m the masks a block began with [B]."""
    owed: Ids = masks // steps + (step < masks % steps)
    return owed


def runs(places: Sequence[int], *, gap: int = 0, bridged: Callable[[int], bool] = lambda _: True) -> list[range]:
    """Ranges that cover the ascending `places`; one may hold at most `gap` others in a row, all of them `bridged`."""
    found: list[range] = []
    for place in places:
        between = range(found[-1].stop, place) if found else range(0)
        if found and len(between) <= gap and all(map(bridged, between)):
            found[-1] = range(found[-1].start, place + 1)
        else:
            found.append(range(place, place + 1))
    return found
