"""What every policy sees. Shape letters: B batch, R head rows (the block)."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Picks = npt.NDArray[np.bool_]
Scores = npt.NDArray[np.float64]

GRID_END = 1e-3  # where Dream's time grid ends: its share of masks is small, not zero


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """One proposed token a head row; `doubt` = 1/p - 1 of it, which never ties where float32 p saturates at 1."""

    doubt: Scores  # [B, R]
    neg_entropy: Scores  # [B, R] sum p ln p of the row's law
    margin: Scores  # [B, R] p of the best token minus p of the second
    masked: Picks  # [B, R] the positions that may be committed
    quota: npt.NDArray[np.int64]  # [B] least number of commits that keeps to the row's number of steps
    flip: Scores  # [B] what Dream's time grid commits of the masks, see `flip_share`; only those in TIMED look
    draws: Scores  # [B, R] uniform in (0, 1), keyed by position; only the policies in DRAWN look at them
    threshold: float
    factor: float
    entropy_bound: float

    @property
    def p(self) -> Scores:
        """Of the proposed tokens [B, R]."""
        return np.asarray(1.0 / (1.0 + self.doubt))

    @property
    def sure(self) -> Picks:
        """Positions whose token has p >= threshold, masked or not [B, R]."""
        return np.asarray(self.p >= self.threshold)

    def rank(self, score: Scores | None = None) -> npt.NDArray[np.int64]:
        """Order of the masked positions by `score` (None: doubt), 0 the lowest; the earlier one on ties [B, R]."""
        # A masked position may score inf, too; it must still stand before all that are not masked.
        finite = np.minimum(self.doubt if score is None else score, np.finfo(np.float64).max)
        order = np.argsort(np.where(self.masked, finite, np.inf), axis=1, kind="stable")
        return np.argsort(order, axis=1, kind="stable")

    def surest(self) -> Picks:
        """The `quota` surest masked positions of each row [B, R]."""
        return self.masked & (self.rank() < self.quota[:, None])

    def grid(self, score: Scores) -> Picks:
        """Dream's count of masked positions with the lowest `score`, at least one [B, R]; arXiv 2508.15487."""
        count = np.maximum(np.floor(self.masked.sum(axis=1) * self.flip), 1)
        return np.asarray(self.masked & (self.rank(score) < count[:, None]))


def flip_share(block_step: npt.NDArray[np.int64], block_steps: npt.NDArray[np.int64]) -> Scores:
    """1 - t[k+1] / t[k] on the even grid from 1 to GRID_END, and 1 from the last step on [B]."""
    done = np.minimum(block_step, block_steps - 1)
    last = block_step >= block_steps - 1
    now, then = (1.0 - (1.0 - GRID_END) * k / block_steps for k in (done, done + 1))
    return np.where(last, 1.0, 1.0 - then / now)
