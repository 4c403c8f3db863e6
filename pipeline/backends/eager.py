"""Runs a graph in torch, on the CPU or wherever its weights are: full precision, and the fake-quant graph.

Shape letters: B batch, R head rows, D hidden, V vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from pipeline.backends.backend import OUTPUTS, Feeds, FullPasses, Record

if TYPE_CHECKING:
    import torch

    from pipeline.models.transformer import Transformer

    Graph = Callable[..., Sequence[torch.Tensor]]


class EagerSession(FullPasses):
    """Any callable with the graph's six inputs and five outputs, maybe more, as a `Session` without a cache."""

    def __init__(self, graph: Graph, *, top_k: int, device: str = "cpu") -> None:
        self.graph: Graph | None = graph
        self.top_k = top_k
        self.device = device

    def full_pass(self, feeds: Feeds) -> Record:
        import torch

        if self.graph is None:
            raise ValueError("this session was closed")
        with torch.inference_mode():
            outputs = self.graph(*(tensor.to(self.device) for tensor in tensors_of(feeds)))
        # Graphs made to be looked into have more outputs.
        arrays = [output.cpu().numpy() for output in outputs[: len(OUTPUTS)]]
        return Record(**dict(zip(OUTPUTS, arrays, strict=True)))

    def close(self) -> None:
        self.graph = None


def tensors_of(feeds: Feeds) -> list[torch.Tensor]:
    """The six inputs that every graph has, in their order."""
    import torch

    return [torch.from_numpy(np.ascontiguousarray(array)) for array in feeds.as_dict().values()]


def head_rows(
    model: Transformer,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    kv_len: torch.Tensor,
    head_index: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [B, R, V] before the bias and hidden states [B, R, D] of the head rows."""
    import torch

    import plugins  # noqa: F401  importing it defines torch.ops.dllmc

    rows = torch.take_along_dim(model.hidden(input_ids, position_ids, kv_len), head_index[..., None], dim=1)
    hidden = model.norm(rows)
    return model.head(hidden).float(), hidden


def transformer_graph(model: Transformer, *, top_k: int) -> Graph:
    """A session's six inputs -> its record, the logits [B, R, V] before the bias, the hidden state [B, R, D]."""
    import torch

    import plugins  # noqa: F401  importing it defines torch.ops.dllmc

    def graph(
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        kv_len: torch.Tensor,
        head_index: torch.Tensor,
        logit_bias: torch.Tensor,
        inv_temp: torch.Tensor,
    ) -> Sequence[torch.Tensor]:
        logits, hidden = head_rows(model, input_ids, position_ids, kv_len, head_index)
        return (*torch.ops.dllmc.record(logits, logit_bias, inv_temp, top_k), logits, hidden)

    return graph


def open_transformer(model: Transformer, *, top_k: int = 8, device: str = "cpu") -> EagerSession:
    """The full-precision model as a session."""
    return EagerSession(transformer_graph(model, top_k=top_k), top_k=top_k, device=device)
