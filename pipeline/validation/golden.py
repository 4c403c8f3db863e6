"""A few passes and what came out of them, so that any machine can replay the bundle on itself.

The tolerance covers another machine's float rounding. In a quantised graph that may move a code by one step; how far
one step carries is measured: torch runs the pass again with an error of a rounding on every operation (`rounding`), so
on the inputs of the quantisers too, and where no code moved, with errors four times as large, until one does.

    tolerance = max(1e-4 * largest magnitude, MARGIN * largest change in REPEATS runs or between torch and ONNX Runtime)
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule

from pipeline.backends.backend import OUTPUTS, Feeds, Record, Session
from pipeline.folder import make_folder, write_json
from pipeline.runner.settings import Settings
from pipeline.validation.feeds import feeds_of, is_banned
from pipeline.validation.rounding import Rounded

SHAPES = ((1, 16), (2, 24))
SMALLEST_TOLERANCE = 1e-4
MARGIN = 4.0
REPEATS = 4
LARGEST_SCALE = 4.0**8  # 2^-8 of a value: what moves no code then has none to move


def golden_feeds(settings: Settings, seed: int) -> list[Feeds]:
    """Random canvases, the right half masked, one row shorter than the canvas where there are two."""
    draw = torch.Generator().manual_seed(seed)
    made = []
    for batch, wanted in SHAPES:
        length = min(wanted, settings.max_length)
        ids = torch.randint(settings.vocab_size, (batch, length), generator=draw)
        ids[:, length // 2 :] = settings.mask_id
        kv_len = torch.tensor([length, max(1, length - 3)][:batch])
        rows = torch.arange(length // 2, length).expand(batch, -1).minimum(kv_len[:, None] - 1)
        made.append(feeds_of(settings, ids, kv_len, rows.contiguous()))
    return made


def write_golden(folder: Path, session: Session, graph: GraphModule, settings: Settings, seed: int) -> int:
    """Write `folder`/pass-N.json from `session`; `graph`, the same in torch, shows how far rounding moves a record."""
    make_folder(folder)
    feeds = golden_feeds(settings, seed)
    for number, one in enumerate(feeds):
        record = session.run(one)
        spread = roundings(graph, one, seed)
        content = {
            "inputs": {name: array.tolist() for name, array in one.as_dict().items()},
            "record": {name: array.tolist() for name, array in record.as_dict().items()},
            "tolerance": {name: _tolerance(name, record, spread) for name in OUTPUTS if name != "top_ids"},
        }
        write_json(folder / f"pass-{number}.json", content)
    return len(feeds)


@torch.no_grad()
def roundings(graph: GraphModule, feeds: Feeds, seed: int) -> list[Record]:
    """The record in torch, then those of REPEATS runs that round otherwise."""
    inputs = [torch.from_numpy(array) for array in feeds.as_dict().values()]
    exact = Rounded(graph)
    records = [_record(exact.run(*inputs))]
    scale = 1.0
    for repeat in range(REPEATS):
        while True:
            moved = Rounded(graph, draw=torch.Generator().manual_seed(seed * REPEATS + repeat), scale=scale)
            found = _record(moved.run(*inputs))
            if _codes_moved(exact, moved) or not exact.left or scale >= LARGEST_SCALE:
                break
            scale *= 4.0
        records.append(found)
    return records


def _codes_moved(one: Rounded, other: Rounded) -> bool:
    return any(not torch.equal(a[0], b[0]) for a, b in zip(one.left, other.left, strict=True))


def _record(outputs: Sequence[Tensor]) -> Record:
    return Record(**{name: output.numpy() for name, output in zip(OUTPUTS, outputs, strict=False)})


def _tolerance(name: str, record: Record, spread: list[Record]) -> float:
    found, exact, *moved = (getattr(one, name).astype(np.float64) for one in (record, *spread))
    compared = ~is_banned(exact)
    largest = max(float(np.abs(other - exact)[compared].max()) for other in (found, *moved))
    return max(SMALLEST_TOLERANCE * max(float(np.abs(found[compared]).max()), 1.0), MARGIN * largest)
