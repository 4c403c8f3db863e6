"""What goes into the loop and what comes out of it. Positions count from the start of the generated region."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from pipeline.backends.backend import Ids


@dataclass(frozen=True, kw_only=True)
class Request:
    """One text to write; `request` keys its random draws.

    `ids` is the prompt, and the region follows it. With `fill`, `ids` is the whole canvas and so is the region: its
    mask ids are written, nothing else. `forced` fixes the ids of positions, `allowed` the only ids a position may get.
    """

    ids: Sequence[int]
    request: int = 0
    fill: bool = False
    forced: Mapping[int, int] = field(default_factory=dict)
    allowed: Mapping[int, frozenset[int]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Result:
    """One finished request; `ids` end before the first end-of-text or stop text, `region` is all that was generated.

    `agreement` is the share of open positions for which the block pass and the full pass of a refresh, on equal ids,
    found the same best id; None where no refresh was monitored.
    """

    request: int
    ids: list[int]
    region: list[int]
    finish_reason: str  # "eos" | "length" | "stop" | "cancelled"
    nfe_full: int  # forward passes over the whole canvas that this row took part in
    nfe_block: int  # those over a window of it
    step_map: list[int]  # the step, from 1, that wrote each position; 0 where none did
    logprobs: list[float]  # ln p of each written id in the pass that wrote it; 0 where no step did
    agreement: float | None = None
    text: str | None = None  # all before the stop text, which may begin inside a token; None without one

    @property
    def nfe(self) -> int:
        """All forward passes."""
        return self.nfe_full + self.nfe_block

    @property
    def tpf(self) -> float:
        """Tokens per forward: `ids`, so nothing at or behind the first end-of-text, over all passes."""
        return len(self.ids) / self.nfe if self.nfe else 0.0


@dataclass(frozen=True, kw_only=True)
class Step:
    """One row after one step, for whoever draws it."""

    request: int
    region: Ids  # the generated part, masks where nothing is committed yet
    committed: Ids  # positions that this step wrote
    confidences: npt.NDArray[np.float64]  # p of each committed id
    finished: bool


@dataclass(frozen=True, kw_only=True)
class Block:
    """Positions start..stop of the region are final; the blocks of a prompt's answer follow each other."""

    request: int
    start: int
    stop: int
    ids: list[int]


@dataclass(frozen=True, kw_only=True)
class Done:
    """The last event of a request."""

    result: Result


Event = Step | Block | Done
