"""Canvases through the float model, one block in memory at a time, every linear's inputs into tallies.

Shape letters: N samples, L sequence, T tokens, K input width of a linear.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.fx import GraphModule

from passes.graph import drop_weights
from passes.observe import Observed
from passes.stats import STATES
from pipeline.calibrate import float_pieces
from pipeline.calibration.canvas import BATCH, Canvas
from pipeline.calibration.states import States
from pipeline.capture import ENDS, constants
from pipeline.errors import InputRefused
from pipeline.models.checkpoint import Checkpoint
from pipeline.outliers.tally import Finding, Tally, Thresholds

SHOWN_TOKENS = 128  # rows of the picture, in each mask state

Tallies = dict[str, dict[str, Tally]]  # by site, then by mask state


@dataclass
class Scan:
    """Findings by site and mask state; `worst` is the site of the largest crest factor, `shown` its first rows."""

    findings: dict[str, dict[str, Finding]] = field(default_factory=dict)
    worst: str = ""
    shown: dict[str, Tensor] = field(default_factory=dict)

    def take(self, tallies: Tallies) -> None:
        """Add the sites of one piece; their rows are kept only while none is worse."""
        for site, by_state in tallies.items():
            self.findings[site] = {state: tally.finding() for state, tally in by_state.items()}
            if not self.worst or self._crest(site) > self._crest(self.worst):
                self.worst = site
                self.shown = {state: torch.cat(tally.shown) for state, tally in by_state.items()}

    def _crest(self, site: str) -> float:
        return max(finding.crest_factor for finding in self.findings[site].values())


@torch.no_grad()
def scan(checkpoint: Checkpoint, states: States, thresholds: Thresholds, *, on_piece: Callable[[str], None]) -> Scan:
    """Outliers of every linear's input; a mask state without rows has no finding, padding never counts.

    Raises InputRefused where an input is not finite.
    """
    found = Scan()
    frequencies = constants(checkpoint.config)["rope_frequencies"]
    canvases = [Canvas(batch, frequencies) for batch in states.batches(BATCH)]
    ends: GraphModule | None = None
    for piece, graph in float_pieces(checkpoint, keep_ends=True):
        tallies: Tallies = {}
        for number, canvas in enumerate(canvases):
            if piece.name == ENDS:
                canvas.enter(graph)
            else:
                canvas.x = _observed(graph, canvas, canvas.inputs, tallies, thresholds, number * BATCH)
        found.take(tallies)
        if piece.name == ENDS:
            ends = graph
        on_piece(piece.name)
    assert ends is not None
    tallies = {}
    for number, canvas in enumerate(canvases):
        _observed(ends, canvas, (canvas.states.input_ids, canvas.x), tallies, thresholds, number * BATCH)
    found.take(tallies)
    drop_weights(ends)
    return found


def _observed(
    graph: GraphModule,
    canvas: Canvas,
    inputs: tuple[Tensor, ...],
    tallies: Tallies,
    thresholds: Thresholds,
    first: int,
) -> Tensor:
    def watch(site: str, x: Tensor, _: Tensor) -> None:
        _check_finite(site, x, canvas.valid, first)
        masked = canvas.states.masked
        for state, rows in zip(STATES, (canvas.valid & ~masked, canvas.valid & masked), strict=True):
            if rows.any():
                by_state = tallies.setdefault(site, {})
                by_state.setdefault(state, Tally(thresholds, SHOWN_TOKENS)).add(x[rows])

    result: Tensor = Observed(graph, watch).run(*inputs)
    return result


def _check_finite(site: str, x: Tensor, valid: Tensor, first: int) -> None:
    bad = ~x.isfinite().all(-1) & valid
    if bad.any():
        sample = first + int(bad.any(1).nonzero()[0])
        raise InputRefused(
            f"the input of {site} is not finite for sample {sample}; the model cannot be scanned: check its weights, "
            "or choose other text with --source"
        )
