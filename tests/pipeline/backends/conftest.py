"""ONNX Runtime as tests listen to it."""

import pytest

from pipeline.backends import ort
from pipeline.backends.ort import session_options


@pytest.fixture
def talkative(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sessions that warn, on standard error; of each copy of a cache, for one."""

    def options(threads: int | None) -> object:
        chosen = session_options(threads)
        chosen.log_severity_level = 2
        return chosen

    monkeypatch.setattr(ort, "session_options", options)
