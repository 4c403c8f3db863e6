"""manifest.json: what a bundle is, and the size and SHA-256 of every file in it. Standard library only.

It is written last. `checksum` covers the manifest itself and `identity` the files that say what the bundle computes:
two exports of one recipe on one kind of machine have one identity, `sha256sum FILES | sha256sum` with sorted names.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import HashMismatch, InputRefused
from pipeline.folder import MANIFEST, MODEL_CARD, VALIDATION, canonical_json, hash_file

SCHEMA_VERSION = 1
MAX_BYTES = 16 << 20
# Both report floats measured on the machine of the export, whose last digits depend on its kind; the golden records,
# measured too, count: they are what every device must compute.
OUTSIDE_IDENTITY = frozenset({VALIDATION, MODEL_CARD})


@dataclass(frozen=True)
class FileEntry:
    """One file of a bundle; `path` is relative, with forward slashes."""

    path: str
    sha256: str
    size_bytes: int
    in_identity: bool


@dataclass(frozen=True)
class Manifest:
    """A manifest whose form was checked; `facts` is all of it but the files and digests."""

    files: tuple[FileEntry, ...]
    identity: str
    facts: Mapping[str, Any]

    @property
    def size_bytes(self) -> int:
        return sum(entry.size_bytes for entry in self.files)


def list_files(folder: Path) -> list[str]:
    """Every file under a folder but the manifest, sorted; HashMismatch for a link, pipe or device."""
    found = []
    for level, folders, files in os.walk(folder, onerror=_raise):
        for name in (*folders, *files):
            path = Path(level, name)
            mode = path.lstat().st_mode
            relative = path.relative_to(folder).as_posix()
            if stat.S_ISREG(mode):
                found.append(relative)
            elif not stat.S_ISDIR(mode):
                raise HashMismatch(f"{path} is neither a file nor a folder; a bundle holds nothing else")
    return sorted(name for name in found if name != MANIFEST)


def _raise(fault: OSError) -> None:
    raise InputRefused(f"{fault.filename} cannot be read: {fault.strerror}") from fault


def describe_files(folder: Path) -> list[FileEntry]:
    """Size and SHA-256 of every file under a folder but the manifest."""
    return [
        FileEntry(name, hash_file(folder / name), (folder / name).stat().st_size, name not in OUTSIDE_IDENTITY)
        for name in list_files(folder)
    ]


def identity_of(files: Iterable[FileEntry]) -> str:
    """SHA-256 over the lines that sha256sum prints for the files in the identity, sorted by name."""
    lines = [f"{entry.sha256}  {entry.path}\n" for entry in files if entry.in_identity]
    return hashlib.sha256("".join(sorted(lines, key=lambda line: line[66:])).encode()).hexdigest()


def build_manifest(folder: Path, facts: Mapping[str, Any]) -> tuple[Manifest, bytes]:
    """The manifest of the files in a folder, and the bytes to write as manifest.json."""
    files = describe_files(folder)
    manifest = Manifest(tuple(files), identity_of(files), dict(facts))
    body = {
        **facts,
        "schema_version": SCHEMA_VERSION,
        "files": [asdict(entry) for entry in files],
        "identity": manifest.identity,
    }
    return manifest, canonical_json({**body, "checksum": hashlib.sha256(canonical_json(body)).hexdigest()})


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a bundle. Raises InputRefused (no bundle, foreign form) and HashMismatch (damaged manifest)."""
    path = folder / MANIFEST
    try:
        if not folder.is_dir():
            raise InputRefused(f"{folder} is not a folder; expected a bundle that `dllmc export` made")
        if not path.is_file() or path.is_symlink():
            raise InputRefused(f"{folder} holds no {MANIFEST}; expected a bundle that `dllmc export` made")
        with path.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
    except OSError as fault:
        raise InputRefused(f"{path} cannot be read: {fault.strerror}") from fault
    if len(content) > MAX_BYTES:
        raise InputRefused(f"{path} has more than {MAX_BYTES} bytes; no bundle of ours needs that")
    body = _check_integrity(path, content)
    version = body.pop("schema_version", None)
    if version != SCHEMA_VERSION:
        raise InputRefused(f"{path} has schema {version!r}, this dllmc reads {SCHEMA_VERSION}; install a newer dllmc")
    try:
        files = tuple(FileEntry(**entry) for entry in body.pop("files"))
        manifest = Manifest(files, body.pop("identity"), body)
        _check_entries(path, files)
    except (KeyError, TypeError) as fault:
        raise InputRefused(f"{path} lacks or misspells a field: {fault}") from fault
    if identity_of(files) != manifest.identity:
        raise HashMismatch(f"{path}: the identity is not that of its files; the manifest was changed")
    return manifest


def _check_integrity(path: Path, content: bytes) -> dict[str, Any]:
    """Parse; HashMismatch unless these are exactly the bytes that were written."""
    damaged = f"{path} is damaged: it is not the manifest that was written; copy or export the bundle again"
    try:
        body = json.loads(content)
        checksum = body.pop("checksum")
        expected = hashlib.sha256(canonical_json(body)).hexdigest()
        if checksum != expected or canonical_json({**body, "checksum": checksum}) != content:
            raise HashMismatch(damaged)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as fault:
        raise HashMismatch(damaged) from fault
    assert isinstance(body, dict)
    return body


def _check_entries(manifest: Path, files: Iterable[FileEntry]) -> None:
    """InputRefused unless every path stays in the folder, is in one normal form and names one file on any system."""
    seen: set[str] = set()
    for entry in files:
        folded = unicodedata.normalize("NFC", entry.path).casefold()
        parts = entry.path.split("/")
        if (
            unicodedata.normalize("NFC", entry.path) != entry.path
            or any(part in ("", ".", "..") for part in parts)
            or any(character in entry.path for character in '\\\0:*?"<>|')
            or not entry.path.isprintable()
            or folded in seen
            or folded == MANIFEST
        ):
            raise InputRefused(f"{manifest} names {entry.path!r}, which is not a plain relative path or stands twice")
        if not re.fullmatch("[0-9a-f]{64}", entry.sha256) or type(entry.size_bytes) is not int or entry.size_bytes < 0:
            raise InputRefused(f"{manifest}: the size or SHA-256 of {entry.path!r} is malformed")
        seen.add(folded)


def verify(folder: Path, *, on_bytes: Callable[[int, int], None] | None = None) -> Manifest:
    """The manifest, after every file was found to be what it names; `on_bytes` gets bytes read and to read.

    Raises HashMismatch naming changed, missing and extra files, InputRefused when this is no bundle.
    """
    manifest = read_manifest(folder)
    present = list_files(folder)
    expected = {entry.path: entry for entry in manifest.files}
    faults = [f"{name} is missing" for name in expected if name not in present]
    faults += [f"{name} is extra" for name in present if name not in expected]
    done = 0

    def count(size: int) -> None:
        nonlocal done
        done += size
        if on_bytes is not None:
            on_bytes(done, manifest.size_bytes)

    faults += [fault for name in present if name in expected for fault in _compare(folder, expected[name], count)]
    if faults:
        raise HashMismatch(f"{folder} is not the bundle that was made: {'; '.join(faults)}; copy or export it again")
    return manifest


def _compare(folder: Path, entry: FileEntry, count: Callable[[int], None]) -> list[str]:
    path = folder / entry.path
    try:
        size = path.stat().st_size
        if size != entry.size_bytes:
            return [f"{entry.path} has {size} bytes, expected {entry.size_bytes}"]
        found = hash_file(path, on_bytes=count)
    except OSError as fault:
        raise InputRefused(f"{path} cannot be read: {fault.strerror}") from fault
    return (
        [] if found == entry.sha256 else [f"{entry.path} has SHA-256 {found[:12]}..., expected {entry.sha256[:12]}..."]
    )
