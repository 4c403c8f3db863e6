"""Where calibration text comes from: the built-in problems, a file of the user, a dataset of the Hugging Face hub.

A text has a prompt and an answer, or is all answer. Nothing here imports torch: a recipe checks its source by it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from pipeline.errors import DllmcError, EnvironmentFault, InputRefused
from pipeline.folder import user_path

FORMS = "builtin, file:PATH or hf:NAME@COMMIT[:SPLIT[:FIELD]]"
HUB = re.compile(
    r"(?P<name>[\w.-]+(/[\w.-]+){0,2})@(?P<commit>[0-9a-f]{40})(:(?P<split>\w+)(:(?P<field>\w+(\+\w+)?))?)?", re.ASCII
)
MAX_BYTES = 1 << 24  # of a file; of a dataset its first ones, since the whole of it may be terabytes
MAX_RECORDS = 1 << 16  # which may be empty, or lines


@dataclass(frozen=True, kw_only=True)
class Text:
    """One text; `prompt` None means that all of it is answer, `where` names it in errors."""

    prompt: str | None
    answer: str
    where: str


def check_source(source: str) -> str:
    """The source itself when it is of a known form; or ValueError."""
    kind, _, rest = source.partition(":")
    if source == "builtin" or (kind == "file" and rest):
        return source
    if kind != "hf":
        raise ValueError(f"{source!r} is no source of text; expected {FORMS}")
    if not HUB.fullmatch(rest):
        raise ValueError(
            f"{source!r} names no dataset; expected hf:OWNER/NAME[/CONFIG]@COMMIT[:SPLIT[:FIELD]], COMMIT in 40 hex "
            "digits (a branch would not give the same text twice), FIELD one name or two as prompt+answer"
        )
    return source


def texts(source: str) -> Iterator[Text]:
    """All texts of a file or dataset, in its order.

    Raises InputRefused for what cannot be read, EnvironmentFault where a dataset cannot be reached.
    """
    kind, _, rest = source.partition(":")
    return READERS[kind](rest)


def source_digest(source: str) -> str:
    """SHA-256 of what a source names but does not pin: the content of a file."""
    kind, _, rest = source.partition(":")
    return hashlib.sha256(_content(rest)).hexdigest() if kind == "file" else ""


def _content(name: str) -> bytes:
    path = user_path(name)
    if not path.is_file():
        found = "a folder" if path.is_dir() else "nothing" if not path.exists() else "no plain file"
        raise InputRefused(f"calibration.source names {name!r}: found {found}, expected a file of text or JSON lines")
    try:
        with path.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
    except OSError as fault:
        raise InputRefused(f"calibration text {name!r} cannot be read: {fault.strerror}") from fault
    if len(content) > MAX_BYTES:
        raise InputRefused(
            f"calibration text {name!r} has more than {MAX_BYTES >> 20} MiB; calibration needs few of them"
        )
    return content


def _file(name: str) -> Iterator[Text]:
    """Paragraphs where blank lines part them, else lines; of a .jsonl file, objects."""
    try:
        content = _content(name).decode("utf-8-sig")
    except UnicodeDecodeError as fault:
        raise InputRefused(f"calibration text {name!r} is not UTF-8: byte {fault.start} is wrong") from fault
    lines = content.rstrip().split("\n")
    if name.lower().endswith(".jsonl"):
        if lines == [""]:
            return
        for number, line in enumerate(lines, start=1):
            where = f"{name} line {number}"
            yield _record(_parsed(line, where), where)
        return
    paragraphs = re.split(r"\n\s*\n", content.replace("\r\n", "\n"))
    many = len([paragraph for paragraph in paragraphs if paragraph.strip()]) > 1
    for number, text in enumerate(paragraphs if many else lines, start=1):
        if text.strip():
            yield Text(prompt=None, answer=text.strip(), where=f"{name} {'paragraph' if many else 'line'} {number}")


def _parsed(line: str, where: str) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as fault:
        raise InputRefused(f"{where} is not JSON: {fault}") from fault


def _record(value: object, where: str) -> Text:
    keys = value.keys() & {"text", "prompt", "answer"} if isinstance(value, dict) else set()
    if not isinstance(value, dict) or keys not in ({"text"}, {"prompt", "answer"}):
        found = f"one with {', '.join(sorted(keys)) or 'neither'}" if isinstance(value, dict) else type(value).__name__
        raise InputRefused(f'{where}: expected an object {{"text"}} or {{"prompt", "answer"}}; found {found}')
    return _text(value, sorted(keys, reverse=True), where)


def _text(record: dict[str, Any], fields: list[str], where: str) -> Text:
    """Of one field the whole text, of two the prompt and the answer."""
    for field in fields:
        if field not in record:
            raise InputRefused(f"{where} has no field {field!r}; it has {', '.join(map(str, record))[:200]}")
        value = record[field]
        if not isinstance(value, str):
            raise InputRefused(f"{where}: {field} is {str(value)[:80]!r}; expected text")
        try:
            value.encode()
        except UnicodeEncodeError as fault:
            raise InputRefused(f"{where}: {field} holds half a surrogate pair; expected Unicode text") from fault
    *prompt, answer = (record[field] for field in fields)
    return Text(prompt=prompt[0] if prompt else None, answer=answer, where=where)


def _hub(name: str) -> Iterator[Text]:
    """The first records of one split at one commit, read as they come, without the rest of the dataset."""
    found = HUB.fullmatch(name)
    assert found, "checked by the recipe"
    fields = (found["field"] or "text").split("+")
    owner, *config = found["name"].rsplit("/", 1) if found["name"].count("/") == 2 else [found["name"]]
    if os.path.exists(owner):
        raise InputRefused(
            f"{owner} is a folder here, which would be read instead of hf:{owner}; work in another folder"
        )
    try:
        from datasets import load_dataset
    except ImportError as fault:
        raise EnvironmentFault(
            f"calibration.source hf:{found['name']} is read by the package datasets ({fault}); "
            "pip install 'dllmc[hf]', or pass --set calibration.source=file:PATH"
        ) from fault
    try:
        split = found["split"] or "train"
        records = load_dataset(owner, *config, split=split, revision=found["commit"], streaming=True)
        left = MAX_BYTES
        for number, record in enumerate(islice(records, MAX_RECORDS)):
            text = _text(record, fields, f"{found['name']} {split} record {number}")
            yield text
            left -= len(f"{text.prompt or ''}{text.answer}".encode())
            if left <= 0:
                return
    except (DllmcError, MemoryError):
        raise
    except Exception as fault:  # of the hub's client, the file formats and the network, which share no class
        raise EnvironmentFault(
            f"the dataset hf:{name} cannot be read: {type(fault).__name__}: {' '.join(str(fault).split())[:300]}; "
            "check name, commit, split and network, or pass --set calibration.source=file:PATH"
        ) from fault


READERS: dict[str, Callable[[str], Iterator[Text]]] = {"file": _file, "hf": _hub}
