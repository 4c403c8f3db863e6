"""Random numbers with a key: (seed, request, position, step) decides, never the batch or the order of calls."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

_LANES = 4  # numbers of 64 bits that Philox4x64 makes from one counter value (Salmon et al., SC 2011)


def uniform_rows(
    *, seed: int, requests: Sequence[int], steps: Sequence[int], starts: Sequence[int], rows: int, columns: int
) -> npt.NDArray[np.float64]:
    """Uniform draws in (0, 1) [B, rows, columns]; row i of b belongs to canvas position starts[b] + i."""
    counters = -(-columns // _LANES)
    raw = np.empty((len(requests), rows, counters * _LANES), dtype=np.uint64)
    stream = np.random.Philox(key=[seed, 0])
    state = stream.state  # setting it costs a quarter of a new stream
    key, counter = state["state"]["key"], state["state"]["counter"]
    for b, (request, step, start) in enumerate(zip(requests, steps, starts, strict=True)):
        key[1], counter[0], counter[1] = request, start * counters, step
        stream.state = state
        # random_raw is what NumPy promises to keep stable (NEP 19).
        raw[b] = stream.random_raw(rows * counters * _LANES).reshape(rows, -1)
    # The half keeps 0 out.
    return ((raw[..., :columns] >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
