"""What decides a result besides its settings: our own code, the versions it stands on, and the model's files."""

import hashlib
import platform
from functools import cache
from pathlib import Path

import passes
import pipeline
import plugins
from pipeline.bundle import made_with
from pipeline.folder import canonical_json, os_faults
from pipeline.models.checkpoint import Checkpoint
from pipeline.version import VERSION


def digest_of(value: object) -> str:
    """SHA-256 of a JSON value, in hexadecimal."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


@cache
def code_digest(*but: str) -> str:
    """Of our own code, its version and those of the packages it stands on: what other code made is made again.

    `but` are patterns such as `pipeline/cli/*.py`, of files that decide nothing.
    """
    rooms = [Path(module.__path__[0]) for module in (pipeline, passes, plugins)]
    sources = hashlib.sha256()
    for path in sorted(path for room in rooms for path in room.rglob("*.py")):
        if not any(path.match(pattern) for pattern in but):
            sources.update(path.read_bytes())
    return digest_of([VERSION, platform.python_version(), made_with(), sources.hexdigest()])


def model_digest(checkpoint: Checkpoint) -> str:
    """Of small files the content, of large ones size and time of change: a model is never read again for this."""
    parts: list[object] = []
    with os_faults("cannot read the model", reads=checkpoint.folder):
        for path in sorted(path for path in checkpoint.folder.iterdir() if path.is_file()):
            status = path.stat()
            small = status.st_size < 1 << 24
            content = hashlib.sha256(path.read_bytes()).hexdigest() if small else status.st_mtime_ns
            parts.append([path.name, status.st_size, content])
    return digest_of(parts)
