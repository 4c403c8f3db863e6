"""Classifier-free guidance: sessions whose rows are requests, over a graph whose rows are pairs, or the model in torch.

A request takes two neighbouring rows, with its prompt and without it, in passes and in the cache; both halves keep
their own keys and values, so a block pass costs two windows instead of two canvases.
Shape letters: B requests, Q query rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline.backends.backend import OUTPUTS, Cache, Feeds, FullPasses, Ids, Record, Session
from pipeline.backends.ort import folds, open_session
from pipeline.errors import InputRefused, UsageFault
from pipeline.folder import MODEL

if TYPE_CHECKING:
    from pipeline.models.transformer import Transformer


@dataclass(frozen=True, eq=False)
class PairCache:
    """A cache of a graph of pairs, as its requests see it."""

    rows: Cache

    @property
    def batch(self) -> int:
        """Requests."""
        return self.rows.batch // 2

    @property
    def slots(self) -> int:
        """Positions of each row."""
        return self.rows.slots

    @property
    def size_bytes(self) -> int:
        """Of both rows of all requests."""
        return self.rows.size_bytes


class GuidedSession:
    """`guided.onnx`, opened: every pass needs `guidance` and `promptless_ids`."""

    cached = True
    guided = True

    def __init__(self, pairs: Session) -> None:
        self.pairs = pairs

    @property
    def top_k(self) -> int:
        return self.pairs.top_k

    def allocate(self, batch: int, slots: int) -> PairCache:
        return PairCache(self.pairs.allocate(2 * batch, slots))

    def run(self, feeds: Feeds, cache: Cache | None = None, *, first_row: int = 0) -> Record:
        if cache is not None and not isinstance(cache, PairCache):
            raise ValueError("this cache was allocated by another session")
        return self.pairs.run(paired(feeds), None if cache is None else cache.rows, first_row=2 * first_row)

    def close(self) -> None:
        self.pairs.close()


def paired(feeds: Feeds) -> Feeds:
    """The rows of a graph of pairs: each request with its prompt, then without. Raises ValueError without guidance."""
    promptless = promptless_ids(feeds)
    return Feeds(
        input_ids=np.stack([feeds.input_ids, promptless], axis=1).reshape(-1, promptless.shape[1]),
        position_ids=np.repeat(feeds.position_ids, 2, axis=0),
        kv_len=np.repeat(feeds.kv_len, 2),
        head_index=np.repeat(feeds.head_index, 2, axis=0),
        logit_bias=feeds.logit_bias,
        inv_temp=np.repeat(feeds.inv_temp, 2),
        write_start=None if feeds.write_start is None else np.repeat(feeds.write_start, 2),
        guidance=feeds.guidance,
    )


def promptless_ids(feeds: Feeds) -> Ids:
    """`promptless_ids` of guided feeds; raises ValueError where they or the strength are missing."""
    if feeds.guidance is None or feeds.promptless_ids is None:
        raise ValueError("a guided pass needs guidance and promptless_ids; got none")
    return feeds.promptless_ids


class EagerGuided(FullPasses):
    """The full-precision model in torch, each pass over both rows of every request."""

    guided = True

    def __init__(self, model: Transformer, *, top_k: int) -> None:
        self.model: Transformer | None = model
        self.top_k = top_k

    def full_pass(self, feeds: Feeds) -> Record:
        import torch

        from pipeline.backends.eager import head_rows, tensors_of

        if self.model is None:
            raise ValueError("this session was closed")
        *inputs, bias, inv_temp = tensors_of(paired(feeds))
        with torch.inference_mode():
            logits, _ = head_rows(self.model, *inputs)
            guided, first = torch.ops.dllmc.guide(logits, inv_temp, torch.from_numpy(feeds.guidance))
            outputs = torch.ops.dllmc.record(guided, bias, first, self.top_k)
        return Record(**dict(zip(OUTPUTS, (output.numpy() for output in outputs), strict=True)))

    def close(self) -> None:
        self.model = None


def open_guided(path: Path, *, threads: int | None = None) -> GuidedSession:
    """Pre-check and open `guided.onnx`; raises as `open_session` does, and UsageFault where a bundle has none."""
    if not path.exists():
        raise UsageFault(
            f"{path.parent} was exported without guidance; pass --guidance 0, or export it again with "
            "--set lowering.guidance=true"
        )
    # The size that decides is that of the data file, which belongs to the exported graph.
    session = open_session(path, threads=threads, fold=folds(path.with_name(MODEL)))
    if not session.guided:
        raise InputRefused(f"{path} has no input guidance; export the bundle again")
    return GuidedSession(session)
