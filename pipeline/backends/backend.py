"""What a session is: six arrays in, five arrays out, whatever runs the graph; a cached one also keeps K and V.

Slot s of a cache holds the post-RoPE key and the value of canvas position s, so a pass over some contiguous rows (its
window) writes theirs at `write_start` on and attends to those that earlier passes left.
Shape letters: B batch, Q query rows, R head rows, K top-K, S slots, V vocabulary rows (embedding rows, not only real
ids).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Feeds:
    """Inputs of one forward pass; slots at or beyond `kv_len` are padding."""

    input_ids: Ids  # [B, Q]
    position_ids: Ids  # [B, Q]
    kv_len: Ids  # [B]
    head_index: Ids  # [B, R] query rows that reach the LM head
    logit_bias: Floats  # [V]
    inv_temp: Floats  # [B]
    write_start: Ids | None = None  # [B] first slot of the window; None is slot 0 in every row
    guidance: Floats | None = None  # [B] strength of classifier-free guidance, for sessions made for it alone
    promptless_ids: Ids | None = None  # [B, Q] `input_ids` with the mask wherever the prompt is; come with `guidance`

    def as_dict(self) -> dict[str, npt.NDArray[Any]]:
        """Name -> array of the six inputs that every graph has, in their order."""
        return {name: getattr(self, name) for name in INPUTS}


@dataclass(frozen=True, kw_only=True)
class Record:
    """What leaves the device for each head row; confidence of the argmax is 1 / (1 + tail)."""

    top_ids: Ids  # [B, R, K] largest logit first, lower id first on ties
    top_logits: Floats  # [B, R, K] after the bias
    tail: Floats  # [B, R] sum of exp(logit - max) over all but the argmax
    neg_entropy: Floats  # [B, R] sum of p ln p
    lse_t: Floats  # [B, R] logsumexp of logit * inv_temp

    def as_dict(self) -> dict[str, npt.NDArray[Any]]:
        """Name -> array, in the order of the graph's outputs."""
        return {name: getattr(self, name) for name in OUTPUTS}


class Cache(Protocol):
    """Keys and values of every layer for `batch` rows of `slots` positions, all zeros at first."""

    @property
    def batch(self) -> int: ...

    @property
    def slots(self) -> int: ...

    @property
    def size_bytes(self) -> int: ...


class Session(Protocol):
    """An opened graph."""

    @property
    def top_k(self) -> int: ...

    @property
    def cached(self) -> bool:
        """Whether passes can keep keys and values; else `allocate` raises ValueError."""
        ...

    @property
    def guided(self) -> bool:
        """Whether every pass needs `guidance`; a session that does not raises ValueError for it."""
        ...

    def allocate(self, batch: int, slots: int) -> Cache:
        """An empty cache; raises WillNotFit when the memory is too small."""
        ...

    def run(self, feeds: Feeds, cache: Cache | None = None, *, first_row: int = 0) -> Record:
        """One forward pass; without a cache it is a full pass that keeps nothing.

        With one, rows `first_row` .. `first_row` + B of it are read and written. Raises ValueError where the window or
        the rows leave the cache.
        """
        ...

    def close(self) -> None:
        """Free the graph; the session cannot run again."""
        ...


class FullPasses(ABC):
    """A `Session` without a cache: whoever extends it says what a full pass is."""

    cached = False
    guided = False  # whether `full_pass` reads `guidance`

    @abstractmethod
    def full_pass(self, feeds: Feeds) -> Record:
        """One pass over canvases from their first position on."""

    def allocate(self, batch: int, slots: int) -> Cache:
        raise ValueError(f"this session keeps no keys and values; asked for a cache of {batch} x {slots}")

    def run(self, feeds: Feeds, cache: Cache | None = None, *, first_row: int = 0) -> Record:
        if (feeds.guidance is not None) != self.guided:
            raise ValueError(f"guidance is {feeds.guidance}; this session is {'' if self.guided else 'not '}guided")
        if cache is not None or first_row:
            raise ValueError(f"this session has no cache; got one and first row {first_row}, expected None and 0")
        if feeds.write_start is not None and feeds.write_start.any():
            raise ValueError(f"a pass without a cache starts at slot 0; got write_start {feeds.write_start.tolist()}")
        return self.full_pass(feeds)

    @abstractmethod
    def close(self) -> None:
        """Free what is held."""


WRITE_START, GUIDANCE = "write_start", "guidance"
INPUTS = tuple(field.name for field in fields(Feeds) if field.name not in (WRITE_START, GUIDANCE, "promptless_ids"))
OUTPUTS = tuple(field.name for field in fields(Record))
