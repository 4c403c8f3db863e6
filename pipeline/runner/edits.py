"""Second thoughts: committed tokens of the block are replaced while it is still open (LLaDA2.1, arXiv 2602.08676).

After the last mask of a block is gone, passes go on until one changes nothing, MAX_EXTRA at most, so editing ends.
Shape letters: B batch, R head rows.
"""

import numpy as np
import numpy.typing as npt

from pipeline.backends.backend import Ids, Record
from pipeline.runner.candidates import Picks

MAX_EXTRA = 16  # passes over one block that has no mask left


def edits(record: Record, current: Ids, editable: Picks, tau: float) -> Picks:
    """Positions whose best id differs from the committed one and has p > tau [B, R]; write top_ids[..., 0] there.

    current [B, R] ids of the canvas; editable [B, R] generated, committed before this pass, and not forced.
    """
    sure = 1.0 / (1.0 + record.tail.astype(np.float64)) > tau
    return np.asarray(editable & sure & (record.top_ids[..., 0] != current))


def is_final(open_before: Picks, replaced: Picks, extra: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Rows whose block is done after this pass [B]: it had no mask before the pass, and the pass changed nothing.

    open_before [B, R] masks before the pass; extra [B] passes without a mask so far, this one included.
    """
    return ~open_before.any(axis=1) & (~replaced.any(axis=1) | (extra >= MAX_EXTRA))
