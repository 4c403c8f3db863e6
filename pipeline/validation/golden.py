"""A few passes and what came out of them, so that any machine can replay the bundle on itself.

The tolerance covers another machine's float rounding, measured by running the pass in torch with an error of SCALE
roundings on every operation (`rounding`), so on the inputs of the quantisers too:

    tolerance = max(1e-4 * largest magnitude, MARGIN * largest change in REPEATS runs or between torch and ONNX Runtime)

A rounding that moves a code moves the record by far more, in a coarse graph by so much that no damage would show. So of
up to TRIES canvases the first is taken whose codes all lie far enough from a half, else that of the least tolerance.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule

from pipeline.backends.backend import OUTPUTS, Feeds, Record, Session
from pipeline.folder import make_folder, write_json
from pipeline.runner.settings import Settings
from pipeline.validation.feeds import feeds_of, is_banned
from pipeline.validation.rounding import Rounded

FLOATS = OUTPUTS[1:]
SHAPES = ((1, 16), (2, 24))
SMALLEST_TOLERANCE = 1e-4
MARGIN = 4.0
SCALE = 2.0
REPEATS = 4
TRIES = 16


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
    for number in range(len(SHAPES)):
        write_json(folder / f"pass-{number}.json", _steadiest(session, graph, settings, seed, number))
    return len(SHAPES)


def _steadiest(session: Session, graph: GraphModule, settings: Settings, seed: int, number: int) -> dict[str, Any]:
    """The content of one file, from the canvas that roundings move least."""
    best: dict[str, Any] = {}
    least = np.inf
    for attempt in range(TRIES):
        feeds = golden_feeds(settings, seed * TRIES + attempt)[number]
        record, spread = session.run(feeds), roundings(graph, feeds, seed)
        floor, moved = zip(*(_bounds(name, record, spread) for name in FLOATS), strict=True)
        if (ratio := float(np.max(np.divide(moved, floor)))) < least or not best:
            least = ratio
            best = {
                "inputs": {name: array.tolist() for name, array in feeds.as_dict().items()},
                "record": {name: array.tolist() for name, array in record.as_dict().items()},
                "tolerance": dict(zip(FLOATS, map(max, floor, moved), strict=True)),
            }
        if least <= 1.0:
            break
    return best


@torch.no_grad()
def roundings(graph: GraphModule, feeds: Feeds, seed: int) -> list[Record]:
    """The record in torch, then those of REPEATS runs that round otherwise."""
    inputs = [torch.from_numpy(array) for array in feeds.as_dict().values()]
    draws = (torch.Generator().manual_seed(seed * REPEATS + repeat) for repeat in range(REPEATS))
    runs = [Rounded(graph), *(Rounded(graph, draw=draw, scale=SCALE) for draw in draws)]
    return [_record(run.run(*inputs)) for run in runs]


def _record(outputs: Sequence[Tensor]) -> Record:
    return Record(**{name: output.numpy() for name, output in zip(OUTPUTS, outputs, strict=False)})


def _bounds(name: str, record: Record, spread: list[Record]) -> tuple[float, float]:
    """The two arguments of the tolerance's max."""
    found, exact, *moved = (getattr(one, name).astype(np.float64) for one in (record, *spread))
    compared = ~is_banned(exact)
    largest = max(float(np.abs(other - exact)[compared].max()) for other in (found, *moved))
    return SMALLEST_TOLERANCE * max(float(np.abs(found[compared]).max()), 1.0), MARGIN * largest
