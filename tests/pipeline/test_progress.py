"""What a run says: one line a stage, a bar only on a terminal and only when it takes time."""

import io
import json
import re
import time
from collections.abc import Callable

import pytest

from pipeline import progress
from pipeline.progress import Progress, clock_text


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "nothing was drawn"
        time.sleep(0.01)


def test_a_stage_is_one_line() -> None:
    stream, clock = io.StringIO(), Clock()
    report = Progress(stream=stream, clock=clock)
    report.begin("export m -> out", ["calibrate", "build"])
    with report.stage("calibrate") as stage:
        for _ in stage.track(range(12), unit="layers"):
            clock.now += 1
        stage.finish("64 samples", samples=64)
    with report.stage("build") as stage:
        stage.skip("no device")
    report.note("done")
    assert stream.getvalue().splitlines() == [
        "export m -> out",
        "[1/2] calibrate    12/12 layers   64 samples   0:12",
        "[2/2] build        skipped: no device   0:00",
        "done",
    ]


def test_a_counter_counts_its_calls() -> None:
    with Progress(stream=io.StringIO()).stage("quantize") as stage:
        count = stage.counter(3, "pieces")
        assert (stage.done, stage.total, stage.unit) == (0, 3, "pieces")
        count("ends")
        count("ends")
        assert (stage.done, stage.total, stage.unit) == (2, 3, "pieces")


def test_machines_get_one_object_a_line() -> None:
    stream = io.StringIO()
    report = Progress(json=True, stream=stream, clock=Clock())
    report.begin("title", ["lower"])
    with report.stage("lower") as stage:
        stage.finish("12 nodes", nodes=12)
    with pytest.raises(KeyboardInterrupt), report.stage("validate"):
        raise KeyboardInterrupt
    events = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert events == [
        {"event": "begin", "title": "title", "stages": ["lower"]},
        {"event": "stage_start", "stage": "lower"},
        {"event": "stage_end", "stage": "lower", "status": "done", "summary": "12 nodes", "seconds": 0.0, "nodes": 12},
        {"event": "stage_start", "stage": "validate"},
        {"event": "stage_end", "stage": "validate", "status": "failed", "summary": "stopped", "seconds": 0.0},
    ]


def test_a_terminal_shows_a_bar_after_two_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "REDRAW_SECONDS", 0.005)
    stream, clock = Terminal(), Clock()
    report = Progress(stream=stream, clock=clock)
    with report.stage("quantize") as stage:
        stage.advance(6, 24, "layers")
        wait_for(lambda: "6/24 layers" in stream.getvalue())
        assert "#" not in stream.getvalue()
        clock.now = 2.0
        wait_for(lambda: "######.................. 6/24 layers" in stream.getvalue())
    assert stream.getvalue().endswith("quantize     6/24 layers   0:02\n")
    assert stream.getvalue().startswith("\r\x1b[K")


def test_a_log_shows_life_and_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "HEARTBEAT_SECONDS", 0.005)
    stream, clock = io.StringIO(), Clock()
    report = Progress(stream=stream, clock=clock)
    with report.stage("quantize") as stage:
        stage.advance(1, 2, "layers")
        clock.now = 61.0
        wait_for(lambda: "1:01" in stream.getvalue())
    assert not re.search("[#\r\x1b]", stream.getvalue())


def test_a_brief_stage_is_silent_unless_it_takes_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "REDRAW_SECONDS", 0.005)
    for stream in (io.StringIO(), Terminal()):
        clock = Clock()
        report = Progress(stream=stream, clock=clock)
        with report.stage("load", brief=True) as stage:
            stage.advance_bytes(5 * 10**6, 20 * 10**6)
            clock.now = 1.9
            time.sleep(0.1)  # twenty drawings
        assert stream.getvalue() == ""
        with pytest.raises(ZeroDivisionError), report.stage("load", brief=True) as stage:
            stage.advance_bytes(5 * 10**6 + 1, 20 * 10**6 + 1)
            clock.now += 2.0
            if stream.isatty():
                wait_for(lambda: "######.................. 5/20 MB" in stream.getvalue())  # noqa: B023
            raise ZeroDivisionError
        assert stream.getvalue().endswith("load         5/20 MB   stopped   0:02\n")


def test_a_brief_stage_says_nothing_to_machines() -> None:
    stream, clock = io.StringIO(), Clock()
    with Progress(json=True, stream=stream, clock=clock).stage("load", brief=True):
        clock.now = 100.0
    assert stream.getvalue() == ""


def test_items_without_a_length_are_counted_when_told() -> None:
    report = Progress(stream=io.StringIO(), clock=Clock())
    with report.stage("x") as stage:
        assert list(stage.track(iter("abc"), unit="items")) == ["a", "b", "c"]
        assert stage.total == 0
        assert list(stage.track(iter("abc"), unit="items", total=3)) == ["a", "b", "c"]
        assert (stage.done, stage.total) == (3, 3)


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.9, "0:59"), (60, "1:00"), (3661, "1:01:01")])
def test_times_read_as_clocks(seconds: float, text: str) -> None:
    assert clock_text(seconds) == text
