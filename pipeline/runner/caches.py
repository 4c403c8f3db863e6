"""Caches of a session, kept from one generation to the next so that memory stays flat."""

from __future__ import annotations

from pipeline.backends.backend import Cache, Session

ROOMY = 2  # a pass costs time by the slots of its cache, so one with more than twice as many is not taken


class Caches:
    """Idle caches of one session; what is taken is its taker's alone until it is given back."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.idle: list[Cache] = []

    def take(self, batch: int, slots: int) -> Cache:
        """A cache with at least that many rows and slots, its content unknown; raises WillNotFit."""
        fitting = [cache for cache in self.idle if cache.batch >= batch and slots <= cache.slots <= ROOMY * slots]
        if not fitting:
            self.idle.clear()  # before the new one is made: both may not fit
            return self.session.allocate(batch, slots)
        best = min(fitting, key=lambda cache: cache.size_bytes)
        self.idle = [cache for cache in self.idle if cache is not best]
        return best

    def give_back(self, cache: Cache) -> None:
        """The cache may be taken again."""
        self.idle.append(cache)
