"""Whole passes over every batch, length and noise level: forced ones for right or wrong, free ones for what it does.

A free run may part from torch where a code rounds differently (see `forced`), so of it only this is asked: that every
value is finite, and that the best ids agree in the share of rows that the recipe asks, random canvases included.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from pipeline.backends.backend import Feeds, Session
from pipeline.validation.forced import Comparison, ForcedModel


@dataclass(frozen=True, kw_only=True)
class PassCheck:
    """Sums over the sweep; `largest` and `tolerance` are those of the place that is worst for its tolerance."""

    passes: int
    rows: int
    not_finite: int
    free_agreement: float
    largest: float
    place: str
    tolerance: float

    @property
    def right(self) -> bool:
        """Nothing but rounding differs."""
        return self.not_finite == 0 and self.largest <= self.tolerance


def check_passes(
    reference: Session,
    candidate: Session,
    forced: ForcedModel,
    sweep: Sequence[Feeds],
    *,
    on_pass: Callable[[int, int], None],
) -> PassCheck:
    """Run every pass of the sweep freely in both sessions, and once forced."""
    rows = agreed = broken = 0
    worst = Comparison(largest=0.0, tolerance=1.0, place="")
    for number, feeds in enumerate(sweep, start=1):
        expected, found = reference.run(feeds), candidate.run(feeds)
        broken += sum(int((~np.isfinite(array)).sum()) for array in found.as_dict().values())
        rows += expected.tail.size
        agreed += int((expected.top_ids[..., 0] == found.top_ids[..., 0]).sum())
        comparison = forced.compare(feeds)
        if not np.isnan(worst.share) and not comparison.share <= worst.share:
            where = f"{comparison.place} of pass {feeds.input_ids.shape[0]} x {feeds.input_ids.shape[1]}"
            worst = replace(comparison, place=where)
        on_pass(number, len(sweep))
    return PassCheck(
        passes=len(sweep),
        rows=rows,
        not_finite=broken,
        free_agreement=agreed / rows,
        largest=worst.largest,
        place=worst.place,
        tolerance=worst.tolerance,
    )
