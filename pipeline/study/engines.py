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
from typing import Any, Protocol, TypeVar

from pipeline.errors import EnvironmentFault, WillNotFit

Order = TypeVar("Order")
Outcome = TypeVar("Outcome")
Measure = Callable[[Order], Outcome]


class Reserves(Protocol):
    """An order that says how many processors it keeps busy."""

    @property
    def threads(self) -> int: ...


Reserving = TypeVar("Reserving", bound=Reserves)


def local(
    measure: Measure[Order, Outcome], orders: Sequence[Order], jobs: int | None
) -> Iterator[tuple[Order, Outcome]]:
    """`jobs` processes; one job, or None, is this process. Raises WillNotFit when one dies."""
    jobs = min(jobs or 1, len(orders))
    if jobs <= 1:
        yield from ((order, measure(order)) for order in orders)
        return
    context = multiprocessing.get_context("spawn")  # threads of torch do not survive a fork
    reader, writer = context.Pipe(duplex=False)
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_live_with, initargs=(reader,)) as pool:
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


def ray(
    measure: Measure[Reserving, Outcome], orders: Sequence[Reserving], jobs: int | None
) -> Iterator[tuple[Reserving, Outcome]]:
    """Tasks of a Ray cluster: the one that RAY_ADDRESS names or this machine runs, else one of its own.

    At most `jobs` cells at a time, without a number as many as the cluster has processors for. Raises EnvironmentFault
    where there is no Ray or no cluster, WillNotFit when a worker dies.
    """
    try:
        import ray as cluster
    except ImportError as fault:
        raise EnvironmentFault(f"--engine ray needs the package ray ({fault}); pip install 'dllmc[ray]'") from fault
    started = not cluster.is_initialized()
    if started:
        _start(cluster)
    most = _most_processors(cluster)
    remote = cluster.remote(max_retries=0)(measure)  # a cell that a worker died of is most likely too large
    waiting = list(reversed(orders))
    running: dict[object, Reserving] = {}
    try:
        while waiting or running:
            while waiting and (jobs is None or len(running) < jobs):
                order = waiting.pop()
                running[remote.options(num_cpus=min(order.threads, most)).remote(order)] = order
            (done, *_), _ = cluster.wait(list(running))
            yield running.pop(done), cluster.get(done)
    except cluster.exceptions.RayTaskError as fault:
        raise fault.cause from fault  # the fault as it was there, without the remote traceback in its words
    except cluster.exceptions.RayError as fault:
        raise WillNotFit(
            f"a worker of the cluster died ({type(fault).__name__}), most likely for memory; pass a lower --jobs, and "
            "the same command to go on"
        ) from fault
    finally:
        for task in running:
            cluster.cancel(task, force=True)
        if started:
            cluster.shutdown()


def _most_processors(cluster: Any) -> int:
    """Of one node: a task that asks for more would wait for ever."""
    return max(int(node["Resources"].get("CPU", 1)) for node in cluster.nodes() if node["Alive"])


def _start(cluster: Any) -> None:
    """Join the cluster, or start one; what Ray raises where it cannot shares no class."""
    try:
        cluster.init(log_to_driver=False, include_dashboard=False, configure_logging=False)
    except (ConnectionError, RuntimeError, TimeoutError, ValueError) as fault:
        where = os.environ.get("RAY_ADDRESS", "this machine")
        words = " ".join(str(fault).split())[:300]
        raise EnvironmentFault(
            f"no Ray cluster at {where}: {words}; check RAY_ADDRESS, or pass --engine local"
        ) from fault


ENGINES: dict[str, Callable[..., Iterator[tuple[Any, Any]]]] = {"local": local, "ray": ray}
