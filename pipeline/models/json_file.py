"""Reading a JSON file of a model folder: bounded, an object, no key twice."""

import json
import stat
from pathlib import Path
from typing import Any

from pipeline.errors import InputRefused

MAX_BYTES = 100 * 2**20


def read_text(path: Path) -> str:
    """The text of a regular file of at most 100 MB; raises InputRefused."""
    try:
        status = path.stat()  # follows links: a hub cache is made of them
        if not stat.S_ISREG(status.st_mode):
            raise InputRefused(f"{path} is not a regular file; put the published {path.name} there")
        if status.st_size > MAX_BYTES:
            raise InputRefused(f"{path} has {status.st_size} bytes, expected at most {MAX_BYTES}; download it again")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputRefused(f"{path.name} is missing in {path.parent}; download the whole model folder") from None
    except UnicodeDecodeError as error:
        raise InputRefused(f"{path} is not UTF-8 text ({error.reason}); download it again") from error
    except OSError as error:
        raise InputRefused(f"{path} cannot be read ({error.strerror}); check its permissions") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; raises InputRefused where it is missing, malformed, or says a key twice."""
    return parse_object(read_text(path), str(path))


def parse_object(text: str, name: str) -> dict[str, Any]:
    """The object in a JSON text; `name` is for the messages."""
    try:
        value = json.loads(text, object_pairs_hook=_no_key_twice)
    except (ValueError, RecursionError) as error:
        raise InputRefused(f"{name} is not valid JSON: {error}; download it again") from error
    if not isinstance(value, dict):
        raise InputRefused(f"{name} holds a {type(value).__name__}, expected an object; download it again")
    return value


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands twice in one object")
    return values
