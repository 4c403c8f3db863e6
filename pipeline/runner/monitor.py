"""Online quality: how much of what a block pass finds do stale keys and values change?

At a refresh the same ids go through a block pass and then through a full pass; the share of open positions for which
both find the same best id is 1 where nothing was stale. Shape letters: B batch, R head rows.
"""

from __future__ import annotations

import numpy as np

from pipeline.backends.backend import Ids, Record
from pipeline.runner.candidates import Picks


class Monitor:
    """Counts of each place of the batch."""

    def __init__(self, places: int) -> None:
        self.equal = np.zeros(places, dtype=np.int64)
        self.compared = np.zeros(places, dtype=np.int64)

    def begin(self, place: int) -> None:
        """A new request came to this place."""
        self.equal[place] = self.compared[place] = 0

    def compare(self, places: Ids, block: Record, full: Record, masked: Picks) -> None:
        """Count the rows [B, R] of both records that are `masked`, which is all that can be committed."""
        same = block.top_ids[..., 0] == full.top_ids[..., 0]
        self.equal[places] += (same & masked).sum(axis=1)
        self.compared[places] += masked.sum(axis=1)

    def agreement(self, place: int) -> float | None:
        """Share of the compared rows that agreed; None where none was compared."""
        compared = int(self.compared[place])
        return int(self.equal[place]) / compared if compared else None
