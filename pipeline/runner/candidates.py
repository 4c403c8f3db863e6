"""What every policy sees. Shape letters: B batch, R head rows (the block)."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Picks = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """One proposed token a head row; `doubt` = 1/p - 1 of it, which never ties where float32 p saturates at 1."""

    doubt: npt.NDArray[np.float64]  # [B, R]
    masked: npt.NDArray[np.bool_]  # [B, R] the positions that may be committed
    quota: npt.NDArray[np.int64]  # [B] least number of commits that keeps to the row's number of steps
    threshold: float

    def rank(self) -> npt.NDArray[np.int64]:
        """Order of the masked positions by doubt, 0 the surest; earlier position first on ties [B, R]."""
        order = np.argsort(np.where(self.masked, self.doubt, np.inf), axis=1, kind="stable")
        return np.argsort(order, axis=1, kind="stable")

    def surest(self) -> Picks:
        """The `quota` surest masked positions of each row [B, R]."""
        return self.masked & (self.rank() < self.quota[:, None])
