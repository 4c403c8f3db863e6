"""What a session is: six arrays in, five arrays out, whatever runs the graph.

Shape letters: B batch, Q query rows, R head rows, K top-K, V vocabulary rows (embedding rows, not only real ids).
"""

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

    def as_dict(self) -> dict[str, npt.NDArray[Any]]:
        """Name -> array, in the order of the graph's inputs."""
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


class Session(Protocol):
    """An opened graph."""

    @property
    def top_k(self) -> int: ...

    def run(self, feeds: Feeds) -> Record:
        """One forward pass."""
        ...

    def close(self) -> None:
        """Free the graph; the session cannot run again."""
        ...


INPUTS = tuple(field.name for field in fields(Feeds))
OUTPUTS = tuple(field.name for field in fields(Record))
