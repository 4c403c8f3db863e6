"""Workers: results in the order of the items, few in memory, the caller's settings of torch, an end after a fault."""

import threading
import time
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.calibration.workers import Workers


@pytest.fixture(params=[1, 2, 5])
def workers(request: pytest.FixtureRequest) -> Iterator[Workers]:
    made = Workers(request.param)
    yield made
    made.close()


@given(count=st.integers(1, 6), items=st.lists(st.integers(0, 9), max_size=20))
def test_results_come_in_order(count: int, items: list[int]) -> None:
    """Also where the first takes longest."""
    workers = Workers(count)

    def slow(item: int) -> int:
        time.sleep(0.0002 * (9 - item))
        return item * item

    try:
        assert list(workers.map(slow, items)) == [item * item for item in items]
    finally:
        workers.close()


def test_several_work_at_once() -> None:
    workers, together = Workers(3), threading.Barrier(3, timeout=20)
    assert sorted(workers.map(lambda item: together.wait() * 0 + item, range(6))) == list(range(6))
    workers.close()


def test_few_results_are_in_memory(workers: Workers) -> None:
    begun: list[int] = []

    def act(item: int) -> int:
        begun.append(item)
        return item

    results = workers.map(act, range(50))
    for number in range(20):
        assert next(results) == number
        time.sleep(0.001)
        assert len(begun) <= number + workers.count
    results.close()  # type: ignore[attr-defined]


def test_torch_is_set_as_for_the_caller(workers: Workers) -> None:
    def settings(_: int) -> tuple[bool, int]:
        return torch.is_grad_enabled(), torch.get_num_threads()

    with torch.no_grad():
        without = set(workers.map(settings, range(9)))
    assert without == {(False, torch.get_num_threads())}
    assert set(workers.map(settings, range(9))) == {(True, torch.get_num_threads())}


def test_a_fault_is_the_first_in_order_and_ends_the_rest(workers: Workers) -> None:
    begun: list[int] = []

    def act(item: int) -> int:
        begun.append(item)
        if item >= 2:
            time.sleep(0.002 if item == 2 else 0)
            raise ValueError(str(item))
        return item

    results = workers.map(act, range(500))
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ValueError, match="2"):
        next(results)
    workers.close()
    assert len(begun) <= 2 + workers.count
