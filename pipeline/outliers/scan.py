"""Canvases through the float model, one block in memory at a time, every linear's inputs into tallies.

Shape letters: N samples, L sequence, T tokens, K input width of a linear.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from passes.fit import Batch
from passes.observe import Watcher
from passes.stats import STATES
from pipeline.calibrate import observe_linears
from pipeline.calibration.states import States
from pipeline.calibration.stream import check_activations
from pipeline.models.checkpoint import Checkpoint
from pipeline.outliers.tally import Finding, Tally, Thresholds

SHOWN_TOKENS = 128  # rows of the picture, in each mask state

Tallies = dict[str, dict[str, Tally]]  # by site, then by mask state


@dataclass
class Scan:
    """Findings by site and mask state; `worst` is the site of the largest crest factor, `shown` rows of it."""

    findings: dict[str, dict[str, Finding]] = field(default_factory=dict)
    worst: str = ""
    shown: dict[str, Tensor] = field(default_factory=dict)

    def take(self, tallies: Tallies) -> None:
        """Add the sites of one piece; their rows are kept only while none is worse."""
        for site, by_state in tallies.items():
            self.findings[site] = {state: tally.finding() for state, tally in by_state.items()}
            if not self.worst or self._crest(site) > self._crest(self.worst):
                self.worst = site
                self.shown = {state: tally.shown for state, tally in by_state.items()}

    def _crest(self, site: str) -> float:
        return max(finding.crest_factor for finding in self.findings[site].values())


@torch.no_grad()
def scan(checkpoint: Checkpoint, states: States, thresholds: Thresholds, *, on_piece: Callable[[str], None]) -> Scan:
    """Outliers of every linear's input; a mask state without rows has no finding, padding never counts.

    Raises InputRefused, with site and sample, where an input is not finite or has one value everywhere.
    """
    found, tallies = Scan(), Tallies()

    def take(piece: str) -> None:
        found.take(tallies)
        tallies.clear()
        on_piece(piece)

    for _ in observe_linears(checkpoint, states, partial(_watched, thresholds, tallies), on_piece=take):
        pass
    found.take(tallies)  # of the head, which comes after the last piece
    return found


def _watched(thresholds: Thresholds, tallies: Tallies, batch: Batch) -> tuple[Watcher, None]:
    def watch(site: str, x: Tensor, _: Tensor) -> None:
        check_activations(x, batch, f"the input of {site}")
        for state, rows in zip(STATES, (batch.valid & ~batch.masked, batch.valid & batch.masked), strict=True):
            if rows.any():
                by_state = tallies.setdefault(site, {})
                by_state.setdefault(state, Tally(thresholds, SHOWN_TOKENS)).add(x[rows])

    return watch, None
