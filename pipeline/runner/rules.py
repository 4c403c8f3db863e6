"""Rules on tokens: a repetition penalty and allowed ids change the record before sampling; stop strings end a text.

A forced token needs no rule: its id is written on the canvas before the first pass, and only masks are ever written.
Shape letters: B batch, R head rows, K top-K, V vocabulary rows, L sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.backends.backend import OUTPUTS, Floats, Ids, Record
from pipeline.errors import UsageFault
from pipeline.runner.candidates import Picks, Scores
from pipeline.runner.eos import BANNED
from pipeline.runner.sampling import FARTHEST, RowLogits, beyond_top, inverse_of

NEGLIGIBLE = -1000.0  # as the record op has it: e^-1000 is 0, and 0 * -1000 is 0, too


def penalise(
    record: Record,
    seen: Sequence[Ids],
    penalty: float,
    *,
    temperature: float = 0.0,
    row_logits: RowLogits | None = None,
    wanted: Picks | None = None,
) -> Record:
    """The record after dividing positive and multiplying negative logits of `seen` ids by `penalty` (arXiv 1909.05858).

    seen: for each row of the batch the ids that count as repeated. Beyond the top-K they keep their weight; only where
    a better id than the penalised best may hide there, `row_logits` (of `penalised_rows`) is asked, and for `wanted`
    [B, R] head rows only (None: all): in a committed row the penalty falls on what it holds.
    """
    if penalty == 1.0:
        return record
    ids, inverse = record.top_ids, inverse_of(temperature)
    repeated = np.stack([np.isin(row, known) for row, known in zip(ids, seen, strict=True)])
    logits = record.top_logits.astype(np.float64)
    changed = np.where(repeated, _penalised(logits, penalty), logits)
    fields = _fields(ids, changed, logits[..., 0], _Rest.of(record, inverse), inverse)
    made = _blend(record, fields, np.asarray(repeated.any(axis=-1)))
    last = logits[..., -1]
    hidden = np.maximum(last, _penalised(last, penalty)) > changed.max(axis=-1)
    if row_logits is not None:
        for b, r in np.argwhere(hidden if wanted is None else hidden & wanted):
            _put(made, int(b), int(r), row_logits(int(b), int(r)).astype(np.float64), inverse)
    return made


def penalised_rows(row_logits: RowLogits, seen: Sequence[Ids], penalty: float) -> RowLogits:
    """Whole rows under the same penalty, each asked for once."""

    @cache
    def rows(b: int, r: int) -> Floats:
        logits = row_logits(b, r).copy()
        logits[seen[b]] = _penalised(logits[seen[b]], penalty)
        return logits

    return rows


def restrict(
    record: Record,
    allowed: Mapping[tuple[int, int], Collection[int]],
    *,
    temperature: float = 0.0,
    row_logits: RowLogits | None = None,
) -> Record:
    """The record with every other id banned in each head row that `allowed` names: (row, head row) -> ids.

    The allowed ids among the top-K share the law; where there is none, `row_logits` is asked. Raises UsageFault where
    nothing is allowed, or it cannot be asked.
    """
    inverse = inverse_of(temperature)
    made = _copy(record)
    for (b, r), choice in allowed.items():
        ids = np.fromiter(choice, dtype=np.int64)
        if len(ids) == 0:
            raise UsageFault(f"row {b} allows no id at row {r} of its block; expected one or more")
        inside = np.isin(record.top_ids[b, r], ids)
        if inside.any():
            logits = np.where(inside, record.top_logits[b, r].astype(np.float64), BANNED)
            fields = _fields(record.top_ids[b, r], logits, np.zeros(()), _Rest.none(), inverse)
            for name, value in fields.items():
                getattr(made, name)[b, r] = value
            continue
        if row_logits is None:
            raise UsageFault(
                f"none of the {len(ids)} allowed ids is among the model's {len(inside)} best, and this bundle cannot "
                f"look further; export it again, so that it has score.onnx"
            )
        whole = np.full(len(logits_row := row_logits(b, r)), np.float64(BANNED))
        whole[ids] = logits_row[ids]
        _put(made, b, r, whole, inverse)
    return made


def _penalised(logits: npt.NDArray[Any], penalty: float) -> npt.NDArray[Any]:
    return np.where(logits > 0, logits / penalty, logits * penalty)


@dataclass(frozen=True)
class _Rest:
    """What lies beyond the top-K, relative to the best logit of the record: sums of e^z, z e^z and e^(z / T)."""

    weight: Scores
    energy: Scores
    warm: Scores

    @classmethod
    def of(cls, record: Record, inverse: float) -> _Rest:
        logits, tail = record.top_logits.astype(np.float64), record.tail.astype(np.float64)
        z = np.maximum(logits - logits[..., :1], NEGLIGIBLE)
        weight, warm = np.exp(z), np.exp(z * inverse)
        energy = (record.neg_entropy + np.log1p(tail)) * (1.0 + tail) - (weight * z).sum(axis=-1)
        return cls(
            weight=beyond_top(record, -z, weight, 1.0),
            energy=np.minimum(energy, 0.0),
            warm=beyond_top(record, -z, warm, inverse),
        )

    @classmethod
    def none(cls) -> _Rest:
        return cls(np.zeros(()), np.zeros(()), np.zeros(()))


def _fields(ids: Ids, logits: Scores, peak: Scores, rest: _Rest, inverse: float) -> dict[str, np.ndarray]:
    """The record of K changed logits and an unchanged rest, which is relative to `peak` [..., K] or [...]."""
    order = np.lexsort((ids, -logits), axis=-1)
    ids, logits = np.take_along_axis(ids, order, axis=-1), np.take_along_axis(logits, order, axis=-1)
    best = logits[..., 0]
    rise = np.minimum(peak - best, FARTHEST)
    z = np.maximum(logits - best[..., None], NEGLIGIBLE)[..., 1:]
    tail = np.exp(z).sum(axis=-1) + rest.weight * np.exp(rise)
    energy = (np.exp(z) * z).sum(axis=-1) + np.exp(rise) * (rest.energy + rise * rest.weight)
    spread = 1.0 + np.exp(z * inverse).sum(axis=-1) + rest.warm * np.exp(np.minimum(rise * inverse, FARTHEST))
    neg_entropy = energy / (1.0 + tail) - np.log1p(tail)
    values = (ids, logits, tail, neg_entropy, best * inverse + np.log(spread))
    return dict(zip(OUTPUTS, values, strict=True))


def _put(record: Record, b: int, r: int, logits: Scores, inverse: float) -> None:
    """Replace one head row by the record of its whole logits [V]."""
    K = record.top_ids.shape[-1]
    everything = _fields(np.arange(len(logits)), logits, np.zeros(()), _Rest.none(), inverse)
    for name in OUTPUTS:
        value = everything[name]
        getattr(record, name)[b, r] = value[:K] if value.ndim else value


def _copy(record: Record) -> Record:
    return Record(**{name: array.copy() for name, array in record.as_dict().items()})


def _blend(record: Record, fields: Mapping[str, np.ndarray], touched: Picks) -> Record:
    """`fields` in the touched head rows, elsewhere the record to the last bit."""
    made = _copy(record)
    for name in OUTPUTS:
        getattr(made, name)[touched] = fields[name][touched]
    return made


@dataclass(frozen=True, kw_only=True)
class Cut:
    """Where a stop string ends a text: `ids` leading ids lie wholly before it, `text` is all before it."""

    ids: int
    text: str


def stop_at(ids: Ids, committed: Picks, stops: Sequence[str], decode: Callable[[list[int]], str]) -> Cut | None:
    """The cut at the first stop string in the committed beginning of a region (ids and committed [L]), or None."""
    length = len(ids) if committed.all() else int(np.argmin(committed))
    known = ids[:length].tolist()
    text = decode(known)
    found = [at for at in (text.find(stop) for stop in stops) if at >= 0]
    if not found:
        return None
    kept = text[: min(found)]
    # A token may hold the last letters before the stop string and its first: then the text ends inside it.
    for count in range(length, -1, -1):
        before = decode(known[:count])
        if len(before) <= len(kept) and kept.startswith(before):
            break
    return Cut(ids=count, text=kept)
