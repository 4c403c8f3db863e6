"""Replays the recorded passes of a bundle on this machine: same inputs, same record, within the stored tolerance.

A golden file is `{"inputs": {name: lists}, "record": {name: lists}, "tolerance": {name: greatest difference}}`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.backends.backend import INPUTS, OUTPUTS, Feeds, Record, Session
from pipeline.errors import InputRefused, ValidationFailed

FLOATS = ("logit_bias", "inv_temp", "top_logits", "tail", "neg_entropy", "lse_t")


@dataclass(frozen=True, kw_only=True)
class Replay:
    """One golden file: the greatest difference of each float output, and the ids that differ with a clear margin."""

    name: str
    differences: dict[str, float]
    wrong_ids: int


def self_test(session: Session, folder: Path, *, on_replay: Callable[[int, int], None] | None = None) -> list[Replay]:
    """Replay `folder`/*.json; raises ValidationFailed naming the first file and output outside its tolerance.

    `on_replay` gets the number of passes done and of all.
    """
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise InputRefused(f"{folder} holds no recorded passes; this bundle cannot test itself, export it again")
    replays = []
    for path in paths:
        replays.append(_replay(session, path))
        if on_replay is not None:
            on_replay(len(replays), len(paths))
    return replays


def _replay(session: Session, path: Path) -> Replay:
    try:
        golden = json.loads(path.read_text(encoding="utf-8"))
        feeds = Feeds(**{name: _array(name, golden["inputs"][name]) for name in INPUTS})
        expected = Record(**{name: _array(name, golden["record"][name]) for name in OUTPUTS})
        tolerance = {name: float(golden["tolerance"][name]) for name in OUTPUTS if name != "top_ids"}
    except (OSError, ValueError, KeyError, TypeError) as fault:
        raise InputRefused(f"{path} is not a recorded pass: {type(fault).__name__} {fault}") from None
    found = session.run(feeds)
    replay = compare(path.name, found, expected, tolerance["top_logits"])
    for name, difference in replay.differences.items():
        if not difference <= tolerance[name]:
            raise ValidationFailed(
                f"{path.name}: {name} differs by {difference:.3g}, the bundle allows {tolerance[name]:.3g}; "
                "this machine does not compute what was validated"
            )
    if replay.wrong_ids:
        raise ValidationFailed(f"{path.name}: {replay.wrong_ids} of {expected.top_ids.size} ids differ from the record")
    return replay


def compare(name: str, found: Record, expected: Record, logit_tolerance: float) -> Replay:
    """Differences of two records; two ids may swap only where their logits are within twice the tolerance."""
    differences = {}
    for output in OUTPUTS[1:]:
        ours, theirs = (getattr(record, output).astype(np.float64) for record in (found, expected))
        if ours.shape != theirs.shape:
            raise ValidationFailed(f"{name}: {output} has shape {ours.shape}, expected {theirs.shape}")
        differences[output] = float(np.max(np.abs(ours - theirs), initial=0.0))
    logits = expected.top_logits.astype(np.float64)
    gaps = -np.diff(logits, axis=-1, append=-np.inf)  # to the next id; the last one has no neighbour to swap with
    gaps[..., -1] = 0.0
    before = np.concatenate((np.full_like(gaps[..., :1], np.inf), gaps[..., :-1]), axis=-1)
    clear = np.minimum(gaps, before) > 2 * logit_tolerance
    wrong = int(np.count_nonzero(clear & (found.top_ids != expected.top_ids)))
    return Replay(name=name, differences=differences, wrong_ids=wrong)


def _array(name: str, value: list[Any]) -> npt.NDArray[Any]:
    return np.array(value, dtype=np.float32 if name in FLOATS else np.int64)
