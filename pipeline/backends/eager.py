"""Runs a graph in torch, on the CPU or wherever its weights are: full precision, and the fake-quant graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from pipeline.backends.backend import OUTPUTS, Feeds, Record

if TYPE_CHECKING:
    import torch

    from pipeline.models.transformer import Transformer

    Graph = Callable[..., Sequence[torch.Tensor]]


class EagerSession:
    """Any callable with the graph's six inputs and five outputs, as a `Session`."""

    def __init__(self, graph: Graph, *, top_k: int, device: str = "cpu") -> None:
        self.graph: Graph | None = graph
        self.top_k = top_k
        self.device = device

    def run(self, feeds: Feeds) -> Record:
        import torch

        if self.graph is None:
            raise ValueError("this session was closed")
        with torch.inference_mode():
            tensors = [torch.from_numpy(np.ascontiguousarray(array)) for array in feeds.as_dict().values()]
            outputs = self.graph(*(tensor.to(self.device) for tensor in tensors))
        # A graph made for debugging also returns its logits.
        arrays = [output.cpu().numpy() for output in outputs[: len(OUTPUTS)]]
        return Record(**dict(zip(OUTPUTS, arrays, strict=True)))

    def close(self) -> None:
        self.graph = None


def open_transformer(model: Transformer, *, top_k: int = 8, device: str = "cpu") -> EagerSession:
    """The full-precision model as a session: hidden rows, gather, norm, head, record."""
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
        x = model.hidden(input_ids, position_ids, kv_len)
        x = torch.take_along_dim(x, head_index[..., None], dim=1)
        logits = model.head(model.norm(x)).float()
        record: Sequence[torch.Tensor] = torch.ops.dllmc.record(logits, logit_bias, inv_temp, top_k)
        return record

    return EagerSession(graph, top_k=top_k, device=device)
