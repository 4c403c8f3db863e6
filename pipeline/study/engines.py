"""Where the cells of a study are measured: in this process, in local ones, or on a Ray cluster. The same numbers.

An engine yields every order with its outcome, in whatever order they are finished.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from pipeline.errors import EnvironmentFault, WillNotFit

Order = TypeVar("Order")
Outcome = TypeVar("Outcome")
Measure = Callable[[Order], Outcome]


def local(measure: Measure[Order, Outcome], orders: Sequence[Order], jobs: int) -> Iterator[tuple[Order, Outcome]]:
    """`jobs` processes; one job is this process. Raises WillNotFit when one dies."""
    if min(jobs, len(orders)) <= 1:
        yield from ((order, measure(order)) for order in orders)
        return
    context = multiprocessing.get_context("spawn")  # threads of torch do not survive a fork
    reader, writer = context.Pipe(duplex=False)
    with ProcessPoolExecutor(
        min(jobs, len(orders)), mp_context=context, initializer=_live_with, initargs=(reader,)
    ) as pool:
        asked = {pool.submit(measure, order): order for order in orders}
        try:
            for done in as_completed(asked):
                yield asked[done], done.result()
        except BrokenProcessPool as fault:
            raise WillNotFit("a process of the study was killed, most likely for memory; lower --jobs") from fault
        except BaseException:
            writer.close()  # ends the workers in the midst of their cells
            raise
    writer.close()


def _live_with(reader: Connection) -> None:
    """End this worker when the study ends, however it does; a Ctrl-C is the study's to answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        try:
            reader.recv_bytes()
        except EOFError:
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def ray(measure: Measure[Order, Outcome], orders: Sequence[Order], jobs: int) -> Iterator[tuple[Order, Outcome]]:
    """Tasks of a Ray cluster: the one that RAY_ADDRESS names or this machine runs, else one of its own.

    At most `jobs` cells at a time. Raises EnvironmentFault where there is no Ray.
    """
    try:
        import ray as cluster
    except ImportError as fault:
        raise EnvironmentFault(f"--engine ray needs the package ray ({fault}); pip install 'dllmc[ray]'") from fault
    started = not cluster.is_initialized()
    if started:
        cluster.init(log_to_driver=False, include_dashboard=False, configure_logging=False)
    remote = cluster.remote(measure)
    waiting = list(reversed(orders))
    running: dict[object, Order] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                order = waiting.pop()
                running[remote.remote(order)] = order
            (done, *_), _ = cluster.wait(list(running))
            yield running.pop(done), cluster.get(done)
    except cluster.exceptions.RayTaskError as fault:
        raise fault.cause from fault  # the fault as it was there, without the remote traceback in its words
    finally:
        for task in running:
            cluster.cancel(task, force=True)
        if started:
            cluster.shutdown()


ENGINES: dict[str, Callable[..., Iterator[tuple[Any, Any]]]] = {"local": local, "ray": ray}
