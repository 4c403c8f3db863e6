"""Sessions that say how likely given ids are, and show whole rows of logits: `score.onnx`, or the model in torch.

The graph is that of a bundle's `model.onnx` up to its ending, on the same data file, so its rows of logits are those
that a full pass of the other records.
Shape letters: B batch, Q query rows, R head rows, V vocabulary rows.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from pipeline.backends.backend import WRITE_START, Feeds, Floats, Ids
from pipeline.backends.ort import checked_layout, folds, open_model, run_bound
from pipeline.backends.ort_cache import Layout, Scratch, bind, bind_inputs, bind_nothing_kept
from pipeline.errors import InputRefused, UsageFault
from pipeline.folder import MODEL

if TYPE_CHECKING:
    import torch

    from pipeline.models.transformer import Transformer

TARGET_IDS, TARGET_LOGP, LOGITS = "target_ids", "target_logp", "logits"


class ScoreSession(Protocol):
    """An opened graph that scores."""

    def log_probabilities(self, feeds: Feeds, target_ids: Ids) -> Floats:
        """ln p [B, R] of an id at each head row of a full pass, at the temperature of the feeds."""
        ...

    def logits(self, feeds: Feeds) -> Floats:
        """Biased logits [B, R, V] of the head rows of a full pass, before the temperature."""
        ...

    def close(self) -> None:
        """Free the graph; the session cannot run again."""
        ...


class OrtScore:
    """`score.onnx` in ONNX Runtime; an output that a call does not ask for never leaves the runtime."""

    def __init__(self, inner: Any, layout: Layout, vocabulary: int) -> None:
        self.inner = inner
        self.layout = layout
        self.vocabulary = vocabulary
        self.scratch = Scratch()

    def log_probabilities(self, feeds: Feeds, target_ids: Ids) -> Floats:
        found = np.empty(feeds.head_index.shape, np.float32)
        return self._run(feeds, target_ids, TARGET_LOGP, found)

    def logits(self, feeds: Feeds) -> Floats:
        found = np.empty((*feeds.head_index.shape, self.vocabulary), np.float32)
        return self._run(feeds, np.zeros_like(feeds.head_index), LOGITS, found)

    def _run(self, feeds: Feeds, target_ids: Ids, output: str, found: Floats) -> Floats:
        if self.inner is None:
            raise ValueError("this session was closed")
        batch, query = feeds.input_ids.shape
        binding = self.inner.io_binding()
        bind_nothing_kept(binding, self.layout, self.scratch, batch, query)
        fed = feeds.as_dict() | {WRITE_START: np.zeros(batch, np.int64), TARGET_IDS: target_ids}
        held = bind_inputs(binding, fed)
        bind(binding.bind_output, output, found)
        run_bound(self.inner, binding, held["input_ids"].shape)
        return found

    def close(self) -> None:
        self.inner = None
        self.scratch = Scratch()


class EagerScore:
    """The full-precision model in torch."""

    def __init__(self, model: Transformer) -> None:
        self.model: Transformer | None = model

    def log_probabilities(self, feeds: Feeds, target_ids: Ids) -> Floats:
        import torch

        with torch.inference_mode():
            found, _ = torch.ops.dllmc.log_probability(*self._rows(feeds), torch.from_numpy(target_ids))
        array: Floats = found.numpy()
        return array

    def logits(self, feeds: Feeds) -> Floats:
        rows, bias, _ = self._rows(feeds)
        array: Floats = (rows + bias).numpy()
        return array

    def _rows(self, feeds: Feeds) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        import torch

        from pipeline.backends.eager import head_rows, tensors_of

        if self.model is None:
            raise ValueError("this session was closed")
        *inputs, bias, inv_temp = tensors_of(feeds)
        with torch.inference_mode():
            logits, _ = head_rows(self.model, *inputs)
        return logits, bias, inv_temp

    def close(self) -> None:
        self.model = None


def open_score(path: Path, *, threads: int | None = None, fold: bool | None = None) -> OrtScore:
    """Pre-check and open `score.onnx`; raises as `open_session` does, and UsageFault where a bundle has none."""
    if not path.exists():
        raise UsageFault(
            f"{path.parent} holds no {path.name}, which scoring needs; an older dllmc exported it, export it again"
        )
    if fold is None:
        fold = folds(path.with_name(MODEL))  # whose data file this one reads
    inner = open_model(path, threads=threads, fold=fold)
    layout = checked_layout(inner, path, {TARGET_IDS: "tensor(int64)"})
    shapes = {value.name: value.shape for value in inner.get_outputs()}
    vocabulary = shapes.get(LOGITS, [None])[-1]
    if TARGET_LOGP not in shapes or not isinstance(vocabulary, int):
        raise InputRefused(f"{path} has outputs {shapes}; expected {TARGET_LOGP}, and {LOGITS} of a fixed width")
    return OrtScore(inner, layout, vocabulary)
