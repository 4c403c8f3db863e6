"""What an ONNX file must be before any runtime opens it, our own files too. Standard library only.

A runtime follows the external-data entries of a model into the file system; published attacks went through `..`,
absolute names, links, pipes, other keys and ORT's own memory-address tag. So this walks every tensor of the model
(initialisers, attributes, subgraphs, functions, sparse tensors) and each entry must name, in plain characters, an
ordinary file that lies beside the model, has one name only, and holds the bytes it claims.
"""

import mmap
import os
import re
import stat
from pathlib import Path
from typing import NamedTuple

from pipeline.backends.wire import BYTES, VARINT, Field, WireError, read_fields
from pipeline.errors import InputRefused

MAX_DEPTH = 64  # messages within messages; protobuf itself stops at 100
PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,254}")
NUMBER = re.compile(r"[0-9]{1,19}")
KNOWN_KEYS = ("location", "offset", "length", "checksum")

# field number -> kind of message; every path on which onnx.proto can hold a TensorProto.
MESSAGES: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}
# Message fields that may stand once: a second one would be merged into the first, entry by entry.
SINGULAR: dict[str, tuple[int, ...]] = {"model": (7,), "attribute": (5, 6, 22), "sparse": (1, 2)}
DATA_LOCATION, EXTERNAL = 14, 1


class _Place(NamedTuple):
    kind: str
    span: tuple[int, int]
    depth: int


def precheck(path: Path) -> None:
    """Raise InputRefused unless the model file and all its external data are safe to open."""
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC) if path.parent.is_dir() else None
    if folder is None:
        raise InputRefused(f"{path.parent} is not a folder; expected one that holds {path.name}")
    try:
        _check_model(path, folder)
    finally:
        os.close(folder)


def _check_model(path: Path, folder: int) -> None:
    handle, size = open_plain(path.name, folder, f"{path}")
    try:
        if size == 0:
            raise InputRefused(f"{path} is empty; expected an ONNX model")
        with mmap.mmap(handle, 0, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as buffer:
            try:
                claims = external_entries(buffer)
            except WireError as fault:
                raise InputRefused(f"{path} is not a well-formed ONNX model: {fault}; export it again") from None
    finally:
        os.close(handle)
    sizes: dict[str, int] = {}
    for claim in claims:
        check_entry(claim, folder, sizes, f"{path}")


def open_plain(name: str, folder: int, what: str) -> tuple[int, int]:
    """Handle and size of an ordinary file with one name in `folder` (a descriptor); raises InputRefused."""
    try:
        before = os.stat(name, dir_fd=folder, follow_symlinks=False)
        if stat.S_ISREG(before.st_mode):
            handle = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
        else:
            raise InputRefused(f"{what} is a link, folder, pipe or device; expected an ordinary file")
    except (OSError, ValueError) as fault:
        raise InputRefused(f"{what} cannot be opened: {fault}") from None
    found = os.fstat(handle)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
        os.close(handle)
        raise InputRefused(
            f"{what} has {found.st_nlink} names (hard links); expected an ordinary file with one; copy it"
        )
    return handle, found.st_size


def external_entries(buffer: memoryview) -> list[dict[str, str]]:
    """The external-data entries of every tensor in a serialised ModelProto; raises WireError."""
    found = []
    waiting = [_Place("model", (0, len(buffer)), 0)]
    while waiting:
        place = waiting.pop()
        if place.depth > MAX_DEPTH:
            raise WireError(f"more than {MAX_DEPTH} messages lie within each other")
        entries: dict[str, str] = {}
        external = False
        seen: set[int] = set()
        for field in read_fields(buffer, place.span):
            if place.kind == "tensor" and field.number == DATA_LOCATION and field.kind == VARINT:
                external = field.value == EXTERNAL
            inner = MESSAGES[place.kind].get(field.number)
            if inner is None:
                continue
            _check_shape(field, place.kind, seen)
            if inner == "entry":
                _add_entry(buffer, field, entries)
            elif inner == "training":
                raise WireError("it carries training graphs, which no runner needs")
            else:
                waiting.append(_Place(inner, field.span, place.depth + 1))
        if external or entries:
            found.append(entries)
    return found


def _check_shape(field: Field, kind: str, seen: set[int]) -> None:
    if field.kind != BYTES:
        raise WireError(f"field {field.number} of a {kind} has wire type {field.kind}")
    if field.number in seen and field.number in SINGULAR.get(kind, ()):
        raise WireError(f"field {field.number} of a {kind} stands twice")
    seen.add(field.number)


def _add_entry(buffer: memoryview, field: Field, entries: dict[str, str]) -> None:
    pair = {1: "", 2: ""}
    for part in read_fields(buffer, field.span):
        if part.number not in pair or part.kind != BYTES or pair[part.number]:
            raise WireError("an external-data entry is not one key and one value")
        try:
            pair[part.number] = bytes(buffer[slice(*part.span)]).decode("utf-8")
        except UnicodeDecodeError:
            raise WireError("an external-data entry is not UTF-8") from None
    key, value = pair[1], pair[2]
    if key not in KNOWN_KEYS or key in entries:
        raise WireError(f"external-data key {key[:40]!r} is unknown or stands twice; known: {', '.join(KNOWN_KEYS)}")
    entries[key] = value


def check_entry(entries: dict[str, str], folder: int, sizes: dict[str, int], model: str) -> None:
    """Raise InputRefused unless one tensor's entries name bytes inside an ordinary file of `folder`."""
    location = entries.get("location", "")
    shown = f"{model}: external data {location[:80]!r}"
    if not PLAIN_NAME.fullmatch(location):
        raise InputRefused(f"{shown} is not a plain file name; expected letters, digits and ._- only, beside the model")
    offset, length = entries.get("offset", "0"), entries.get("length", "")
    if not (NUMBER.fullmatch(offset) and NUMBER.fullmatch(length)):
        raise InputRefused(f"{shown} has offset {offset[:40]!r} and length {length[:40]!r}; expected whole numbers")
    if location not in sizes:
        handle, sizes[location] = open_plain(location, folder, shown)
        os.close(handle)
    if int(length) == 0 or int(offset) + int(length) > sizes[location]:
        raise InputRefused(
            f"{shown} claims bytes {offset} to {int(offset) + int(length)}; the file has {sizes[location]}"
        )
