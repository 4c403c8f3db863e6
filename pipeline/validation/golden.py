"""A few passes and what came out of them, so that any machine can replay the bundle on itself.

The tolerance covers another machine's float rounding. In a quantised graph that may move a code by one step; how far
one step carries is measured, by running the pass again on inputs that are moved by a rounding.
"""

from pathlib import Path

import numpy as np
import torch

from pipeline.backends.backend import OUTPUTS, Feeds, Record, Session
from pipeline.folder import make_folder, write_json
from pipeline.models.config import ModelConfig
from pipeline.validation.feeds import feeds_of

SHAPES = ((1, 16), (2, 24))
SMALLEST_TOLERANCE = 1e-4
MARGIN = 4.0


def golden_feeds(config: ModelConfig, seed: int) -> list[Feeds]:
    """Random canvases, the right half masked, one row shorter than the canvas where there are two."""
    draw = torch.Generator().manual_seed(seed)
    made = []
    for batch, wanted in SHAPES:
        length = min(wanted, config.max_length)
        ids = torch.randint(config.vocab_size, (batch, length), generator=draw)
        ids[:, length // 2 :] = config.mask_id
        kv_len = torch.tensor([length, max(1, length - 3)][:batch])
        rows = torch.arange(length // 2, length).expand(batch, -1).minimum(kv_len[:, None] - 1)
        made.append(feeds_of(config, ids, kv_len, rows.contiguous()))
    return made


def write_golden(folder: Path, session: Session, reference: Session, config: ModelConfig, seed: int) -> int:
    """Write `folder`/pass-N.json from `session`; `reference` (torch) shows how far rounding moves a record."""
    make_folder(folder)
    feeds = golden_feeds(config, seed)
    for number, one in enumerate(feeds):
        record = session.run(one)
        tolerance = {name: _tolerance(name, record, reference.run(one)) for name in OUTPUTS if name != "top_ids"}
        content = {
            "inputs": {name: array.tolist() for name, array in one.as_dict().items()},
            "record": {name: array.tolist() for name, array in record.as_dict().items()},
            "tolerance": tolerance,
        }
        write_json(folder / f"pass-{number}.json", content)
    return len(feeds)


def _tolerance(name: str, record: Record, other: Record) -> float:
    found, again = getattr(record, name), getattr(other, name)
    scale = max(float(np.abs(found).max()), 1.0)
    return max(SMALLEST_TOLERANCE * scale, MARGIN * float(np.abs(found - again).max()))
