"""Engines measure every cell once, pass faults on as they are, and leave no process behind."""

import math
import operator
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import EnvironmentFault, UsageFault, WillNotFit
from pipeline.study.engines import ENGINES, local, ray

ORDERS = [3, 1, 4, 15]
ROOT = Path(__file__).parents[3]

INTERRUPT = signal.getsignal(signal.SIGINT)  # ignored, where the whole suite runs in the background


@pytest.mark.parametrize("jobs", [1, 2, 9])
def test_every_order_is_measured_once(jobs: int) -> None:
    assert sorted(local(operator.neg, ORDERS, jobs)) == sorted((order, -order) for order in ORDERS)


def test_one_job_is_this_process_and_keeps_the_order() -> None:
    assert list(local(lambda order: os.getpid() + order, ORDERS, 1)) == [(n, os.getpid() + n) for n in ORDERS]
    assert list(local(operator.neg, [], 2)) == []
    assert list(local(lambda order: os.getpid(), [1, 2], None)) == [(1, os.getpid()), (2, os.getpid())]


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_fault_ends_the_study_as_itself(jobs: int) -> None:
    with pytest.raises(ValueError, match=r"math domain|nonnegative"):
        list(local(math.sqrt, [-1.0, 4.0], jobs))


def test_a_worker_that_is_killed_is_named() -> None:
    with pytest.raises(WillNotFit, match="lower --jobs"):
        list(local(os._exit, [1, 1], 2))


def test_workers_end_with_a_study_that_is_killed(tmp_path: Path) -> None:
    """In the midst of their cells: nobody waits for what they would find."""
    orders = [f"echo $PPID > {tmp_path}/{n}; exec sleep 20" for n in range(2)]
    script = f"import os; from pipeline.study.engines import local; list(local(os.system, {orders!r}, 2))"
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT)
    workers = [tmp_path / str(n) for n in range(2)]
    wait_until(lambda: all(path.is_file() and path.read_text().strip() for path in workers))
    process.kill()
    process.wait()
    wait_until(lambda: not any(is_alive(int(path.read_text())) for path in workers))


def is_alive(pid: int) -> bool:
    """A zombie, which nobody here may reap, is not."""
    status = Path(f"/proc/{pid}/stat")
    try:
        return status.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(holds: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


@dataclass(frozen=True)
class Asked:
    """An order of a cluster; more threads than any node has must not wait for ever."""

    number: int
    threads: int = 1


def refused(order: Asked) -> int:
    raise UsageFault(f"order {order.number} is refused")


def negative(order: Asked) -> int:
    return -order.number


def dies(order: Asked) -> int:
    os._exit(1)


def running(order: Asked) -> tuple[float, float]:
    started = time.monotonic()
    time.sleep(0.5)
    return started, time.monotonic()


@pytest.mark.parametrize("jobs", [2, None])
def test_ray_measures_the_same_and_leaves_the_cluster(cluster: Any, jobs: int | None) -> None:
    orders = [Asked(3), Asked(1, threads=64), Asked(15)]
    found = {order.number: outcome for order, outcome in ray(negative, orders, jobs)}
    assert found == {3: -3, 1: -1, 15: -15}
    with pytest.raises(UsageFault, match=r"^order 3 is refused$"):
        list(ray(refused, orders, jobs))
    assert cluster.is_initialized()


def test_cells_of_one_thread_run_side_by_side(cluster: Any, tmp_path: Path) -> None:
    """Where nobody forbids it: each waits for the other."""

    def meets(order: Asked) -> bool:
        (tmp_path / str(order.number)).touch()
        end = time.monotonic() + 60
        while not (tmp_path / str(3 - order.number)).exists() and time.monotonic() < end:
            time.sleep(0.05)
        return (tmp_path / str(3 - order.number)).exists()

    assert [met for _, met in ray(meets, [Asked(1), Asked(2)], None)] == [True, True]


def test_a_cell_has_the_processors_that_it_asks_for(cluster: Any) -> None:
    """Of two: cells of two threads run one after the other."""
    (a, b), (c, d) = (times for _, times in ray(running, [Asked(1, 2), Asked(2, 2)], None))
    assert max(a, c) >= min(b, d)


def test_a_worker_of_the_cluster_that_dies_is_named(cluster: Any) -> None:
    with pytest.raises(WillNotFit, match=r"a worker of the cluster died .*--jobs"):
        list(ray(dies, [Asked(1)], 1))


@pytest.mark.parametrize("fault", [ConnectionError, RuntimeError, ValueError])
def test_a_cluster_that_cannot_be_reached_is_named(
    cluster: Any, fault: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(**unused: object) -> None:
        raise fault("nobody\nanswers")

    monkeypatch.setattr(cluster, "is_initialized", lambda: False)
    monkeypatch.setattr(cluster, "init", unreachable)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.9:6379")
    with pytest.raises(
        EnvironmentFault, match=r"no Ray cluster at 10\.0\.0\.9:6379: nobody answers; check RAY_ADDRESS"
    ):
        list(ray(negative, [Asked(1)], 1))


def test_engines_are_in_their_table() -> None:
    assert list(ENGINES.items()) == [("local", local), ("ray", ray)]
    assert signal.getsignal(signal.SIGINT) is INTERRUPT  # a worker's setting stays in the worker
