"""Engines measure every cell once, pass faults on as they are, and leave no process behind."""

import math
import operator
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UsageFault, WillNotFit
from pipeline.study.engines import ENGINES, local, ray

ORDERS = [3, 1, 4, 15]
ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("jobs", [1, 2, 9])
def test_every_order_is_measured_once(jobs: int) -> None:
    assert sorted(local(operator.neg, ORDERS, jobs)) == sorted((order, -order) for order in ORDERS)


def test_one_job_is_this_process_and_keeps_the_order() -> None:
    assert list(local(lambda order: os.getpid() + order, ORDERS, 1)) == [(n, os.getpid() + n) for n in ORDERS]
    assert list(local(operator.neg, [], 2)) == []


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


def refused(order: int) -> int:
    raise UsageFault(f"order {order} is refused")


def test_ray_measures_the_same_and_leaves_the_cluster(cluster: Any) -> None:
    assert sorted(ray(abs_of, ORDERS, 2)) == sorted((order, abs_of(order)) for order in ORDERS)
    with pytest.raises(UsageFault, match=r"^order 3 is refused$"):
        list(ray(refused, ORDERS, 2))
    assert cluster.is_initialized()


def abs_of(order: int) -> int:
    return abs(order - 10)


def test_engines_are_in_their_table() -> None:
    assert list(ENGINES.items()) == [("local", local), ("ray", ray)]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler  # a worker's setting stays in the worker
