"""Typed reading of a foreign `config.json`: a key that matters has no default, and a wrong value is refused by name.

Every number in the file is hostile until it is bounded: sizes end up in shapes and loops.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.errors import InputRefused

MAX_SIZE = 2**24
MAX_LAYERS = 1024


@dataclass(frozen=True)
class Fields:
    """The values of one `config.json`; `family` is for the messages."""

    values: Mapping[str, Any]
    family: str

    def refused(self, key: str, expected: str) -> InputRefused:
        """What to raise for a value that is there and will not do."""
        return InputRefused(
            f"config.json: {key} is {self.values.get(key)!r}, expected {expected} ({self.family}); "
            "correct the file, or download it again"
        )

    def has(self, key: str) -> bool:
        """Whether the key is there and not null."""
        return self.values.get(key) is not None

    def require(self, key: str) -> Any:
        """The value of a key that must be there."""
        if key not in self.values:
            raise InputRefused(
                f"config.json: {key} is missing; a {self.family} checkpoint must state it, there is no default; "
                "add the key, or download the file again"
            )
        return self.values[key]

    def size(self, key: str, limit: int = MAX_SIZE) -> int:
        """A whole number from 1 to `limit`."""
        value = self.require(key)
        if type(value) is not int or not 1 <= value <= limit:
            raise self.refused(key, f"a whole number from 1 to {limit}")
        return value

    def number(self, key: str) -> float:
        """A finite number above 0."""
        value = self.require(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise self.refused(key, "a finite number above 0")
        return float(value)

    def flag(self, key: str) -> bool:
        """true or false, as JSON writes them."""
        value = self.require(key)
        if type(value) is not bool:
            raise self.refused(key, "true or false")
        return value

    def token(self, key: str, rows: int) -> int:
        """A token id below `rows`, the number of embedding rows; a list of one id is that id."""
        value = self.require(key)
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        if type(value) is not int or not 0 <= value < rows:
            raise self.refused(key, f"one token id from 0 to {rows - 1}, an id that has an embedding row")
        return value

    def pad(self, eos_id: int, rows: int) -> int:
        """`pad_token_id`, or EOS where the file has none: a padded slot is never attended, so any id does."""
        return self.token("pad_token_id", rows) if self.has("pad_token_id") else eos_id

    def refuse_switched_on(self, features: Mapping[str, tuple[Any, ...]]) -> None:
        """Raise for the first feature whose value is none of those under which it is off (or is what we do)."""
        for key, accepted in features.items():
            value = self.values.get(key)
            if value is None or any(type(value) is type(off) and value == off for off in accepted):
                continue
            expected = " or ".join(repr(off) for off in accepted) or "null"
            raise InputRefused(
                f"config.json: {key} is {value!r}, which dllmc does not implement for {self.family}; "
                f"expected {expected}, null or no such key; this checkpoint cannot be exported"
            )

    def quotient(self, total: str, part: str) -> int:
        """The size `total` divided by the size `part`, without remainder."""
        whole, size = self.size(total), self.size(part)
        if whole % size:
            raise self.refused(part, f"a divisor of {total} = {whole}")
        return whole // size

    def head_dim(self, total: str, heads: str) -> int:
        """Channels a head, `head_dim` where the file states it; even, because rotary embeddings turn pairs."""
        stated = self.has("head_dim")
        channels = self.size("head_dim") if stated else self.quotient(total, heads)
        if channels % 2:
            raise self.refused("head_dim" if stated else heads, f"an even number of channels a head, not {channels}")
        return channels
