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
        arrays = [output.cpu().numpy() for output in outputs]
        return Record(**dict(zip(OUTPUTS, arrays, strict=True)))

    def close(self) -> None:
        self.graph = None


def record(
    logits: torch.Tensor, logit_bias: torch.Tensor, inv_temp: torch.Tensor, top_k: int
) -> Sequence[torch.Tensor]:
    """The five outputs of logits [B, R, V], by their definition."""
    import torch

    biased = logits + logit_bias
    ordered, ids = biased.sort(dim=-1, descending=True, stable=True)
    z = ordered - ordered[..., :1]
    tail = z[..., 1:].exp().sum(-1)
    mean_z = (z * z.exp()).sum(-1) / (1 + tail)
    lse = torch.logsumexp(biased * inv_temp[:, None, None], dim=-1)
    return ids[..., :top_k], ordered[..., :top_k], tail, mean_z - torch.log1p(tail), lse


def open_transformer(model: Transformer, *, top_k: int = 8, device: str = "cpu") -> EagerSession:
    """The full-precision model as a session: hidden rows, gather, norm, head, record."""
    import torch

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
        return record(model.head(model.norm(x)).float(), logit_bias, inv_temp, top_k)

    return EagerSession(graph, top_k=top_k, device=device)
