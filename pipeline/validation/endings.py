"""score.onnx and guided.onnx against the exported graph and torch.

All are one graph up to its ending, so ids and logits of a record are equal bit for bit to what torch takes from the
rows of logits that score.onnx shows. What reduces a whole row (the rest of the record, and likelihoods) is computed
once more in torch: sums in float64 on both sides, rounded to float32 once, so they may differ by TOLERANCE of their
magnitude.
Shape letters: B batch, Q query rows, R head rows, V vocabulary rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.backends.backend import OUTPUTS, Feeds, Record, Session
from pipeline.backends.guided import paired
from pipeline.backends.score import ScoreSession
from pipeline.runner.settings import Settings

TOLERANCE = 2.0**-22
SMALLEST = 1e-12  # of a difference: what cancels near 0 in float64
STRONGEST = 2.0  # of guidance


@dataclass(frozen=True, kw_only=True)
class EndingCheck:
    """Sums over the passes; `differing` ids and logits, `largest` relative difference of what reduces a row."""

    passes: int
    rows: int
    differing: int
    largest: float
    tolerance: float = TOLERANCE

    @property
    def right(self) -> bool:
        """Nothing but the last rounding differs."""
        return self.differing == 0 and self.largest <= self.tolerance


def check_scores(
    exported: Session, scorer: ScoreSession, settings: Settings, feeds: Sequence[Feeds], seed: int
) -> EndingCheck:
    """The record of every pass is that of the logits shown, and the likelihoods of random ids are theirs."""
    draw = np.random.default_rng(seed)
    differing, largest = 0, [0.0]
    for one in feeds:
        logits = torch.from_numpy(scorer.logits(one))
        no_bias, inv_temp = torch.zeros(logits.shape[-1]), torch.from_numpy(one.inv_temp)
        expected = torch.ops.dllmc.record(logits, no_bias, inv_temp, exported.top_k)
        wrong, gap = _record_gap(exported.run(one), expected)
        targets = draw.integers(0, settings.vocab_size, one.head_index.shape)
        log_p, _ = torch.ops.dllmc.log_probability(logits, no_bias, inv_temp, torch.from_numpy(targets))
        differing += wrong
        largest += [gap, _gap(scorer.log_probabilities(one, targets), log_p)]
    return _summed(feeds, differing, largest)


def check_guided(
    guided: Session, scorer: ScoreSession, settings: Settings, feeds: Sequence[Feeds], seed: int
) -> EndingCheck:
    """The record of every pass is that of the formula on the logits shown with half the canvas as prompt, and without.

    The first row of each pass is guided by nothing, others by random strengths.
    """
    draw = np.random.default_rng(seed)
    differing, largest = 0, [0.0]
    for one in feeds:
        strength = draw.uniform(0, STRONGEST, len(one.kv_len)).astype(np.float32) * (np.arange(len(one.kv_len)) > 0)
        half = one.position_ids < one.input_ids.shape[1] // 2
        without = np.where(half, settings.mask_id, one.input_ids)
        asked = replace(one, guidance=strength, promptless_ids=without)
        rows = replace(paired(asked), logit_bias=np.zeros_like(one.logit_bias))
        logits, inv_temp = torch.from_numpy(scorer.logits(rows)), torch.from_numpy(rows.inv_temp)
        combined, first = torch.ops.dllmc.guide(logits, inv_temp, torch.from_numpy(strength))
        bias = torch.from_numpy(one.logit_bias)
        wrong, gap = _record_gap(guided.run(asked), torch.ops.dllmc.record(combined, bias, first, guided.top_k))
        differing += wrong
        largest.append(gap)
    return _summed(feeds, differing, largest)


def _summed(feeds: Sequence[Feeds], differing: int, largest: list[float]) -> EndingCheck:
    rows = sum(one.head_index.size for one in feeds)
    # Python's max hides a NaN that is not the first.
    return EndingCheck(passes=len(feeds), rows=rows, differing=differing, largest=float(np.max(largest)))


def _record_gap(found: Record, expected: Sequence[Tensor]) -> tuple[int, float]:
    """How many ids and logits differ, and the largest relative difference of the rest."""
    known = dict(zip(OUTPUTS, expected, strict=True))
    wrong = sum(int(np.count_nonzero(getattr(found, name) != known[name].numpy())) for name in OUTPUTS[:2])
    return wrong, float(np.max([_gap(getattr(found, name), known[name]) for name in OUTPUTS[2:]]))


def _gap(found: npt.NDArray[np.float32], expected: Tensor) -> float:
    known = expected.numpy().astype(np.float64)
    gap = np.maximum(np.abs(found - known) - SMALLEST, 0.0)
    return float(np.max(gap / np.maximum(np.abs(known), np.finfo(np.float32).tiny), initial=0.0))
