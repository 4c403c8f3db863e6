"""One request's canvas: prompt, then `gen_length` masks that are committed block by block."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.backends.backend import Ids
from pipeline.runner.settings import GenerateOptions, Settings


@dataclass(frozen=True, kw_only=True)
class Result:
    """One finished request; `ids` end before the first end-of-text, `region` is all that was generated."""

    request: int
    ids: list[int]
    region: list[int]
    finish_reason: str  # "eos" | "length"
    nfe: int  # forward passes this row took part in


class Canvas:
    """Ids, block pointer and step counter of one row; every number here is the row's own, never the batch's."""

    def __init__(self, prompt: list[int], request: int, settings: Settings, options: GenerateOptions) -> None:
        self.request = request
        self.start = len(prompt)
        self.settings = settings
        self.options = options
        self.ids: Ids = np.full(self.start + options.gen_length, settings.mask_id, dtype=np.int64)
        self.ids[: self.start] = prompt
        self.open: npt.NDArray[np.bool_] = np.arange(len(self.ids)) >= self.start  # generated and not yet committed
        self.nfe = 0
        self._enter(self.start)

    def _enter(self, start: int) -> None:
        self.block = (start, min(start + self.options.block_length, len(self.ids)))
        self.block_step = 0

    @property
    def block_steps(self) -> int:
        """The block's share of the steps, in proportion to its length; equal to LLaDA's where steps divide."""
        total, length = self.options.steps or self.options.gen_length, self.options.gen_length
        start, end = (position - self.start for position in self.block)
        return max(1, total * end // length - total * start // length)

    @property
    def quota(self) -> int:
        """Least commits of this step: m // T + [step < m mod T], m the block's length (LLaDA's schedule)."""
        length = self.block[1] - self.block[0]
        return length // self.block_steps + (self.block_step < length % self.block_steps)

    @property
    def finished(self) -> bool:
        return not self.open.any()

    def commit(self, positions: Ids, ids: Ids) -> None:
        """Write the ids of one step, then end the row or enter the next block if that step settled it."""
        self.ids[positions] = ids
        self.open[positions] = False
        self.nfe += 1
        self.block_step += 1
        if self._is_answered():
            self.ids[self.open] = self.settings.eos_id
            self.open[:] = False
        elif not self.open[self.block[0] : self.block[1]].any() and not self.finished:
            self._enter(self.block[1])

    def _is_answered(self) -> bool:
        # Later commits cannot change what stands before an end-of-text with no mask in front of it.
        ends = np.flatnonzero(self.ids[self.start :] == self.settings.eos_id)
        return len(ends) > 0 and not self.open[: self.start + ends[0]].any()

    def result(self) -> Result:
        """What was generated; call it on a finished canvas."""
        region: list[int] = self.ids[self.start :].tolist()
        eos = self.settings.eos_id
        ended = eos in region
        ids = region[: region.index(eos)] if ended else region
        return Result(
            request=self.request,
            ids=ids,
            region=region,
            finish_reason="eos" if ended else "length",
            nfe=self.nfe,
        )
