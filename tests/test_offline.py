"""No command opens a socket: an export, a check and a generation work on a machine without a network."""

import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.__main__ import main
from tests.exports import export

# A hook of the interpreter sees every socket, also one that a library makes; it cannot be removed, only disarmed.
ARMED: list[bool] = []
OPENED: list[str] = []


def _watch(event: str, arguments: tuple[object, ...]) -> None:
    if ARMED and event.startswith("socket."):
        OPENED.append(event)
        raise OSError(f"{event} {arguments}: there is no network in this test")


sys.addaudithook(_watch)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Any use of a socket raises, and is remembered where a library swallows it."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    OPENED.clear()
    ARMED.append(True)
    yield
    ARMED.clear()


def test_the_watch_sees_a_socket(offline: None) -> None:
    with pytest.raises(OSError, match="no network"):
        socket.socket()
    with pytest.raises(OSError, match="no network"):
        socket.getaddrinfo("localhost", 80)
    assert OPENED == ["socket.__new__", "socket.getaddrinfo"]


def test_all_commands_work_offline(model: Callable[..., Path], tmp_path: Path, offline: None) -> None:
    output = tmp_path / "out"
    assert export(model("llada", layers=1), output, "rtn-w4a4") == 0
    assert main(["verify", str(output)]) == 0
    assert main(["inspect", str(output)]) == 0
    assert main(["run", str(output), "--self-test", "--threads", "1"]) == 0
    assert main(["run", str(output), "--prompt", "sort 3 1 2:", "--threads", "1"]) == 0
    assert OPENED == []
