"""Captures: the whole model on the meta device, and one piece of it (a block, or its two ends) with real weights.

The same passes run on both. Pieces are what calibration and quantisation hold in memory, one at a time; the whole graph
has shapes but no weights, and is what gets lowered. Weight names are those of the whole model in every capture.
Shape letters: B batch, Q query rows, R head rows, D hidden, C channels a head, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor, nn
from torch.export import Dim, export
from torch.fx import GraphModule

from passes.base import run
from passes.clean_capture import CleanCapture
from passes.graph import attribute, attribute_name, attributes, copied_nodes, set_attributes
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
    """Block `index` alone, under its name in the whole model.

    `state` int32 [B, Q] is 1 at masked positions: nothing reads it yet, but passes may add what does.
    """

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict({str(index): Block(config)})

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, visible: Tensor, state: Tensor) -> Tensor:
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


def capture_whole(config: ModelConfig, *, top_k: int, debug_logits: bool = False) -> GraphModule:
    """Float graph of the whole model on the meta device, linears merged; it has shapes but no weights."""
    template = _whole_template(untied(config), top_k, debug_logits)
    return _merged(template, attributes(template), index=None)


def capture_piece(config: ModelConfig, piece: Piece, weights: dict[str, Tensor]) -> GraphModule:
    """Float graph of one piece, linears merged, with real `weights` (float32, by name before merging)."""
    if piece.name == ENDS:
        return _merged(_ends_template(untied(config)), weights, index=None)
    return _merged(_block_template(untied(config)), weights, index=int(piece.name.rpartition(".")[2]))


# Tracing takes most of the time of a small export, and every block has the same graph: each kind is traced once.
@cache
def _whole_template(config: ModelConfig, top_k: int, debug_logits: bool) -> GraphModule:
    with torch.device("meta"):
        module = Recorded(config, top_k=top_k, debug_logits=debug_logits)
    return _trace(module, *whole_inputs(config))


def whole_inputs(config: ModelConfig) -> tuple[tuple[Tensor, ...], tuple[object, ...]]:
    """Inputs of the whole graph to trace it with, on the meta device, and which of their dimensions vary."""
    batch, query, rows = Dim("batch"), Dim("query"), Dim("rows")
    with torch.device("meta"):
        ids, lengths, chosen = (torch.zeros(shape, dtype=torch.long) for shape in ((2, 5), (2,), (2, 3)))
        # Of one tensor given twice the exporter makes one input.
        example = (ids, ids.clone(), lengths, chosen, torch.zeros(config.embedding_size), torch.zeros(2))
    canvas, per_row = {0: batch, 1: query}, {0: batch}
    return example, (canvas, canvas, per_row, {0: batch, 1: rows}, None, per_row)


@cache
def _ends_template(config: ModelConfig) -> GraphModule:
    shape = {0: Dim("batch"), 1: Dim("query")}
    with torch.device("meta"):
        example = (torch.zeros(2, 5, dtype=torch.long), torch.zeros(2, 5, config.hidden_size))
        return _trace(Ends(config), example, (shape, shape))


@cache
def _block_template(config: ModelConfig) -> GraphModule:
    batch, query = Dim("batch"), Dim("query")
    rotary = {0: batch, 2: query}
    with torch.device("meta"):
        angle = torch.zeros(2, 1, 5, config.head_dim)
        # Of one tensor given twice the exporter makes one input, and sine would be cosine.
        example = (
            torch.zeros(2, 5, config.hidden_size),
            angle,
            angle.clone(),
            torch.ones(2, 1, 5, 5, dtype=torch.bool),
            torch.zeros(2, 5, dtype=torch.int32),
        )
        rows = {0: batch, 1: query}
        return _trace(OneBlock(config, 0), example, (rows, rotary, rotary, {**rotary, 3: query}, rows))


def _trace(module: nn.Module, example: tuple[Tensor, ...], shapes: tuple[object, ...]) -> GraphModule:
    graph = export(module.eval(), example, dynamic_shapes=shapes, strict=False).module(check_guards=False)
    assert isinstance(graph, GraphModule)
    run(graph, [CleanCapture()], check_float)
    return graph


def _merged(template: GraphModule, weights: Mapping[str, Tensor], *, index: int | None) -> GraphModule:
    """A copy of the template that reads `weights`; a block's copy under the names of block `index`."""
    graph = copied_nodes(template)
    shapes = {}
    for node in graph.find_nodes(op="get_attr"):
        value = attribute(template, node)
        if index is not None:
            node.target = f"blocks.{index}.{attribute_name(node).removeprefix('blocks.0.')}"
        shapes[attribute_name(node)] = value
    copy = GraphModule(shapes, graph)
    set_attributes(copy, weights)
    run(copy, [MergeLinears()], check_float)
    return copy


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
