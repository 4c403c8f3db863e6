"""The machines that can run a graph, by name; each imports its own library only when a session is opened."""

from collections.abc import Callable

from pipeline.backends import eager, ort
from pipeline.backends.backend import Cache, Feeds, Record, Session

BACKENDS: dict[str, Callable[..., Session]] = {
    "eager": eager.open_transformer,
    "ort": ort.open_session,
}

__all__ = ["BACKENDS", "Cache", "Feeds", "Record", "Session"]
