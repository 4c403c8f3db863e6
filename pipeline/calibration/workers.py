"""Threads that compute the batches of a calibration; results come in the order of the batches, however many work."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


class Workers:
    """`count` threads, each with torch's present number of threads for one op; one alone is the caller itself."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool: ThreadPoolExecutor | None = None
        if count > 1:
            # How a sum is split over threads decides its last bits, so every worker has as many as the caller.
            self._pool = ThreadPoolExecutor(count, "calibration", torch.set_num_threads, (torch.get_num_threads(),))

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Results in the order of the items, at most `count` of them in memory."""
        if self._pool is None:
            yield from map(function, items)
            return
        with_gradients = torch.is_grad_enabled()

        def act(item: Item) -> Result:
            with torch.set_grad_enabled(with_gradients):  # which a new thread does not inherit
                return function(item)

        waiting: deque[Future[Result]] = deque()
        try:
            for item in items:
                waiting.append(self._pool.submit(act, item))
                if len(waiting) == self.count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

    def close(self) -> None:
        """Wait for what is computed at the moment, drop the rest."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
