"""The licence of a checkpoint, carried over: its files, and what the front matter of its README says."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.errors import UsageFault
from pipeline.models.links import check_link
from pipeline.recipe_file import parse_yaml

log = logging.getLogger(__name__)

FILE_NAME = re.compile(r"(LICEN[CS]E|NOTICE|COPYING|USE_POLICY)[A-Za-z0-9._-]{0,40}", re.IGNORECASE)
MAX_BYTES = 1 << 20
CARRIED_KEYS = ("license", "license_name", "license_link", "language")


@dataclass(frozen=True)
class Licence:
    """`files` by name; `front_matter` holds the keys of `CARRIED_KEYS` that the README has."""

    files: Mapping[str, bytes] = field(default_factory=dict)
    front_matter: Mapping[str, str | list[str]] = field(default_factory=dict)


def read_licence(folder: Path) -> Licence:
    """The licence of a checkpoint folder; empty where it states none. Raises InputRefused for a link out of it."""
    # A bundle must unpack on a file system that does not tell cases apart.
    paths = {path.name.casefold(): path for path in sorted(folder.iterdir(), reverse=True)}
    chosen = [path for path in paths.values() if FILE_NAME.fullmatch(path.name) and path.is_file()]
    files = {path.name: content for path in sorted(chosen) if (content := _read(path)) is not None}
    readme = folder / "README.md"
    content = _read(readme) if readme.is_file() else None
    return Licence(files, _front_matter((content or b"").decode("utf-8", errors="replace")))


def _read(path: Path) -> bytes | None:
    check_link(path)
    with path.open("rb") as stream:
        content = stream.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        log.warning("%s is larger than %d bytes and is not carried over", path, MAX_BYTES)
        return None
    return content


def _front_matter(readme: str) -> dict[str, str | list[str]]:
    found = re.match(r"---\r?\n(.*?)\r?\n---\r?(\n|$)", readme, re.DOTALL)
    if not found:
        return {}
    try:
        data = parse_yaml(found.group(1), "the front matter of the checkpoint's README.md")
    except UsageFault as fault:
        log.warning("%s; its licence is not carried over", fault)
        return {}
    if not isinstance(data, dict):
        return {}
    return {key: data[key] for key in CARRIED_KEYS if _is_short_text(data.get(key))}


def _is_short_text(value: object) -> bool:
    if isinstance(value, list):
        return 0 < len(value) <= 50 and all(isinstance(item, str) and _is_short_text(item) for item in value)
    return isinstance(value, str) and 0 < len(value) <= 200 and value.isprintable()
