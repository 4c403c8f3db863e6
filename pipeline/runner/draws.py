"""Random numbers with a key: (seed, request, position, step) decides, never the batch or the order of calls."""

import numpy as np
import numpy.typing as npt

_LANES = 4  # numbers of 64 bits that Philox4x64 makes from one counter value (Salmon et al., SC 2011)


def uniform(*, seed: int, request: int, step: int, start: int, rows: int, columns: int) -> npt.NDArray[np.float64]:
    """Uniform draws in (0, 1) [rows, columns]; row i belongs to canvas position start + i."""
    counters = -(-columns // _LANES)
    stream = np.random.Philox(key=[seed, request], counter=[start * counters, step, 0, 0])
    # random_raw is what NumPy promises to keep stable (NEP 19); the half keeps 0 out.
    raw = stream.random_raw(rows * counters * _LANES).reshape(rows, counters * _LANES)[:, :columns]
    return ((raw >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
