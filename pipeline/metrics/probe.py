"""A whole model in torch that also shows its logits and hidden states: at full precision, or simulated.

The hidden state is what the final norm gives, gain and all, in the coordinates of the checkpoint: where a method turns
the residual stream, it is turned back, so that every candidate compares with full precision.
Shape letters: B batch, Q query rows, R head rows, D hidden, V vocabulary rows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.graph import CodeGen

from passes.base import run
from passes.graph import calls, is_call, node_of, site_of
from passes.invariants import check_quantized
from passes.methods import METHODS
from passes.quant_spec import HEAD
from passes.rotate_stream import stream_rotation
from passes.widen_floats import WidenFloats
from pipeline.backends.backend import OUTPUTS, Feeds, FullPasses, Record
from pipeline.backends.eager import transformer_graph
from pipeline.capture import materialise
from pipeline.errors import ValidationFailed
from pipeline.lower import simulated_graph
from pipeline.models.checkpoint import Checkpoint, load_model
from pipeline.models.transformer import Transformer
from pipeline.quantize import Weights
from pipeline.recipe import Recipe

ops = torch.ops.dllmc
NORM = "norm.weight"

# The six inputs of a session -> the five outputs of its record, the logits before the bias, the hidden state.
Graph = Callable[..., Sequence[Tensor]]


@dataclass(frozen=True, kw_only=True)
class Observation:
    """One pass: the record, `logits` [B, R, V] after the bias, `hidden` [B, R, D]; both float32."""

    record: Record
    logits: Tensor
    hidden: Tensor


class Probe(FullPasses):
    """A `Session` that can be looked into; `original` takes what the graph calls hidden to the model's coordinates."""

    def __init__(self, graph: Graph, *, top_k: int, original: Callable[[Tensor], Tensor] | None = None) -> None:
        self.graph: Graph | None = graph
        self.top_k = top_k
        self.original = original

    def observe(self, feeds: Feeds) -> Observation:
        """One forward pass; raises ValidationFailed when a logit is not finite."""
        if self.graph is None:
            raise ValueError("this probe was closed")
        with torch.inference_mode():
            tensors = [torch.from_numpy(np.ascontiguousarray(array)) for array in feeds.as_dict().values()]
            *record, logits, hidden = self.graph(*tensors)
            if not logits.isfinite().all():
                raise ValidationFailed("the model produced NaN or infinite logits; nothing can be measured on it")
            return Observation(
                record=Record(**{name: tensor.numpy() for name, tensor in zip(OUTPUTS, record, strict=True)}),
                logits=logits.float() + torch.from_numpy(feeds.logit_bias),
                hidden=hidden if self.original is None else self.original(hidden),
            )

    def full_pass(self, feeds: Feeds) -> Record:
        return self.observe(feeds).record

    def close(self) -> None:
        """Free the graph."""
        self.graph = None


def float_probe(checkpoint: Checkpoint, *, top_k: int = 8) -> Probe:
    """The model at full precision."""
    return transformer_probe(load_model(checkpoint), top_k=top_k)


def transformer_probe(model: Transformer, *, top_k: int = 8) -> Probe:
    """A model that is loaded."""
    return Probe(transformer_graph(model, top_k=top_k), top_k=top_k)


def simulated_probe(checkpoint: Checkpoint, recipe: Recipe, weights: Weights) -> Probe:
    """The model with simulated quantisation, its weights from the sidecar files; float parts in float64."""
    config = checkpoint.config
    lowering = recipe.lowering.model_copy(update={"debug_logits": True})
    graph = simulated_graph(config, recipe.model_copy(update={"lowering": lowering}), weights.numbers)
    show_hidden(graph)
    run(graph, [WidenFloats()], check_quantized)
    materialise(graph, weights.all())
    if not METHODS[recipe.method].rotates_stream:
        return Probe(graph, top_k=lowering.top_k)
    rotation = stream_rotation(config.hidden_size, recipe.calibration.seed)
    gain = checkpoint.tensor(NORM).float()  # a norm before a rotation has lost its own to the head
    return Probe(graph, top_k=lowering.top_k, original=lambda hidden: rotation.undo(hidden) * gain)


def show_hidden(graph: GraphModule) -> None:
    """Add an output: what the head reads, before it is quantised."""
    (head,) = (linear for linear in calls(graph, torch.ops.aten.linear.default) if site_of(linear) == HEAD)
    source = node_of(head.args[0])
    while is_call(source, ops.fake_quant.default):
        source = node_of(source.args[0])
    (output,) = graph.graph.find_nodes(op="output")
    output.args = ((*output.args[0], source),)
    graph.graph.set_codegen(CodeGen())  # the capture's own still counts the outputs it was made with
    graph.recompile()
