"""The denoising loop with everything on the device: each step is one captured graph, the host only replays.

Every block starts with a full pass over the canvas. Cached, its other steps pass the block's rows alone and read the
keys and values of the rest as that full pass left them; uncached, every step is a full pass. A step commits the
surest masked positions of the block, always the same number, so both models do the same work (LLaDA's quota with
equal shares; dual cache of Fast-dLLM, arXiv 2505.22618).
Shape letters: S canvas, R block rows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bench.gpu.machine import Machine
from bench.gpu.model import Model, Recorded
from bench.gpu.timing import capture


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Sizes of a loop: `generated` positions behind the prompt, in blocks of `block` rows, each in `steps` steps."""

    canvas: int
    generated: int
    block: int
    steps: int

    @property
    def prompt(self) -> int:
        """Length of the prompt."""
        return self.canvas - self.generated

    @property
    def quota(self) -> int:
        """Commits a step."""
        return self.block // self.steps

    def check(self) -> None:
        """Raise ValueError where blocks or steps do not divide, or nothing stands in front of the first block."""
        if self.generated % self.block or self.block % self.steps or self.prompt < 1:
            raise ValueError(f"schedule does not divide; got {self}")


def commit(ids: Tensor, record: Recorded, rows: Tensor, mask_id: int, quota: int) -> None:
    """Write the `quota` surest masked positions among `rows` [R] of ids [S]; earlier position first on ties."""
    masked = ids[rows] == mask_id
    doubt = torch.where(masked, record.tail, torch.inf)
    picked = torch.sort(doubt, stable=True).indices[:quota]
    ids.index_copy_(0, rows[picked], record.ids[picked])


class Loop:
    """One model's loop for one schedule; the graphs are captured once and replayed in every run."""

    def __init__(self, machine: Machine, model: Model, schedule: Schedule, cached: bool) -> None:
        schedule.check()
        self.schedule, self.cached, self.model = schedule, cached, model
        device = machine.device
        self.ids = torch.zeros(schedule.canvas, dtype=torch.int64, device=device)
        self.start = torch.zeros(1, dtype=torch.int64, device=device)
        self._slots = torch.arange(schedule.canvas, device=device)
        self._shift = int(model.shape.shifted)
        self._block_rows = torch.arange(schedule.block, device=device)
        # A shifted model predicts position j from row j - 1, so the window starts one row early.
        self._window = torch.arange(-self._shift, schedule.block, device=device)
        self.begin(torch.ones(schedule.prompt, dtype=torch.int64, device=device))
        self._full_step = capture(machine, self._full_pass)
        self._block_step = capture(machine, self._block_pass) if cached else self._full_step

    def begin(self, prompt: Tensor) -> None:
        """A canvas of the prompt and masks."""
        self.ids[: self.schedule.prompt] = prompt
        self.ids[self.schedule.prompt :] = self.model.shape.mask_id
        self.start.fill_(self.schedule.prompt)

    def _commit(self, record: Recorded) -> None:
        rows = self.start + self._block_rows
        commit(self.ids, record, rows, self.model.shape.mask_id, self.schedule.quota)

    def _full_pass(self) -> None:
        rows = self.start + self._block_rows
        self._commit(self.model(self.ids, self._slots, rows - self._shift))

    def _block_pass(self) -> None:
        positions = self.start + self._window
        self._commit(self.model(self.ids[positions], positions, self._block_rows))

    def run(self) -> None:
        """Denoise the canvas that `begin` laid out."""
        for _ in range(self.schedule.generated // self.schedule.block):
            self._full_step()
            for _ in range(self.schedule.steps - 1):
                self._block_step()
            self.start += self.schedule.block
