"""Captures: the whole model on the meta device, and one piece of it (a block, or its two ends) with real weights.

The same passes run on both. Pieces are what calibration and quantisation hold in memory, one at a time; the whole graph
has shapes but no weights, and is what gets lowered. Weight names are those of the whole model in every capture.
Shape letters: B batch, Q query rows, R head rows, D hidden, C channels a head, V vocabulary.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.export import Dim, export
from torch.fx import GraphModule

from passes.base import run
from passes.clean_capture import CleanCapture
from passes.graph import attributes, set_attributes
from passes.invariants import check_float
from passes.merge_linears import MergeLinears
from pipeline.models.config import ModelConfig
from pipeline.models.transformer import Block, RMSNorm, Transformer, rotary_frequencies

INPUT_NAMES = ("input_ids", "position_ids", "kv_len", "head_index", "logit_bias", "inv_temp")
OUTPUT_NAMES = ("top_ids", "top_logits", "tail", "neg_entropy", "lse_t")
ENDS = "ends"


class Recorded(Transformer):
    """The whole model with the signature that a session runs: ids in, the record of the chosen rows out."""

    def __init__(self, config: ModelConfig, *, top_k: int, debug_logits: bool = False) -> None:
        super().__init__(untied(config))
        self.top_k, self.debug_logits = top_k, debug_logits

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        kv_len: Tensor,
        head_index: Tensor,
        logit_bias: Tensor,
        inv_temp: Tensor,
    ) -> tuple[Tensor, ...]:
        x = self.hidden(input_ids, position_ids, kv_len)
        rows = x.gather(1, head_index[:, :, None].expand(-1, -1, x.shape[-1]))
        logits = self.head(self.norm(rows))
        record = torch.ops.dllmc.record(logits, logit_bias, inv_temp, self.top_k)
        return (*record, logits) if self.debug_logits else tuple(record)


class OneBlock(nn.Module):
    """Block `index` alone, under its name in the whole model."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict({str(index): Block(config)})

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, visible: Tensor) -> Tensor:
        (block,) = self.blocks.values()
        out: Tensor = block(x, cos, sin, visible)
        return out


class Ends(nn.Module):
    """Embedding, and final norm with LM head, under their names in the whole model."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed = nn.Embedding(config.embedding_size, config.hidden_size)
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.head = nn.Linear(config.hidden_size, config.embedding_size, bias=False)

    def forward(self, input_ids: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.embed(input_ids), self.head(self.norm(x))


@dataclass(frozen=True)
class Piece:
    """A part of the model small enough to hold; `weights` are the checkpoint's names it needs, before merging."""

    name: str
    weights: tuple[str, ...]


def untied(config: ModelConfig) -> ModelConfig:
    """The same model with its head under its own name, since embedding and head are stored in different formats."""
    return replace(config, tied_head=False)


def pieces(config: ModelConfig) -> list[Piece]:
    """The ends first, then the blocks in order."""
    with torch.device("meta"):
        ends = Piece(ENDS, tuple(Ends(config).state_dict()))
        blocks = (Piece(f"blocks.{i}", tuple(OneBlock(config, i).state_dict())) for i in range(config.num_layers))
        return [ends, *blocks]


def _float_graph(module: nn.Module, example: tuple[Tensor, ...], shapes: tuple[object, ...]) -> GraphModule:
    program = export(module.eval(), example, dynamic_shapes=shapes, strict=False)
    graph = program.module(check_guards=False)
    assert isinstance(graph, GraphModule)
    run(graph, [CleanCapture(), MergeLinears()], check_float)
    return graph


def capture_whole(config: ModelConfig, *, top_k: int, debug_logits: bool = False, device: str = "meta") -> GraphModule:
    """Float graph of the whole model, linears merged; on `meta` it has no weights."""
    batch, query, rows = Dim("batch"), Dim("query"), Dim("rows")
    with torch.device(device):
        module = Recorded(config, top_k=top_k, debug_logits=debug_logits)
        ids, lengths, rows_of = (torch.zeros(shape, dtype=torch.long) for shape in ((2, 5), (2,), (2, 3)))
        example = (ids, ids.clone(), lengths, rows_of, torch.zeros(config.embedding_size), torch.zeros(2))
    canvas, per_row = {0: batch, 1: query}, {0: batch}
    return _float_graph(module, example, (canvas, canvas, per_row, {0: batch, 1: rows}, None, per_row))


def capture_piece(config: ModelConfig, piece: Piece, weights: dict[str, Tensor]) -> GraphModule:
    """Float graph of one piece, linears merged, with real `weights` (float32, by name before merging)."""
    batch, query = Dim("batch"), Dim("query")
    x = torch.zeros(2, 5, config.hidden_size)
    shape = {0: batch, 1: query}
    example: tuple[Tensor, ...]
    shapes: tuple[object, ...]
    if piece.name == ENDS:
        module: nn.Module = Ends(config)
        example, shapes = (torch.zeros(2, 5, dtype=torch.long), x), (shape, shape)
    else:
        module = OneBlock(config, int(piece.name.rpartition(".")[2]))
        angle = torch.zeros(2, 1, 5, config.head_dim)
        # Of one tensor given twice the exporter makes one input, and sine would be cosine.
        example = (x, angle, angle.clone(), torch.ones(2, 1, 5, 5, dtype=torch.bool))
        rotary = {0: batch, 2: query}
        shapes = (shape, rotary, rotary, {0: batch, 2: query, 3: query})
    module.load_state_dict(weights, assign=True)
    return _float_graph(module, example, shapes)


def constants(config: ModelConfig) -> dict[str, Tensor]:
    """What the whole graph reads besides the checkpoint's weights."""
    return {"rope_frequencies": rotary_frequencies(config)}


def materialise(graph: GraphModule, weights: dict[str, Tensor], device: str = "cpu") -> GraphModule:
    """Give a graph captured on the meta device its weights, so that it runs on `device`; in place."""
    set_attributes(graph, {name: weights[name].to(device) for name in attributes(graph)})
    for node in graph.graph.nodes:
        if "device" in node.kwargs:
            node.update_kwarg("device", torch.device(device))
    graph.recompile()
    return graph
