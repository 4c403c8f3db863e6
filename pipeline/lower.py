"""Stage lower: the whole graph, without weights, through the same passes, translated to ONNX; weights written last.

It rewrites nothing of its own: passes make the graph, `plugins` say what each op means, `torch.onnx` translates.
"""

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir
import torch
from torch import Tensor
from torch.export import Dim
from torch.fx import GraphModule

import plugins
from passes.add_cache import WRITE_START, AddCache, kept_arrays, past_names, present_names
from passes.base import run
from passes.graph import attributes
from passes.invariants import check_lowered
from passes.lowering import LOWERING
from pipeline.backends.precheck import precheck
from pipeline.capture import INPUT_NAMES, OUTPUT_NAMES, capture_whole, whole_inputs
from pipeline.errors import InputRefused
from pipeline.folder import GUIDED, SCORE
from pipeline.lower_endings import guided_model, save_beside, score_model
from pipeline.models.config import ModelConfig
from pipeline.quantize import Weights, quant_plan, simulate
from pipeline.recipe import Recipe

IR_VERSION = 11
ALIGNMENT = 4096  # one page, so that a runtime can map the weights


def simulated_graph(config: ModelConfig, recipe: Recipe, numbers: Mapping[str, float]) -> GraphModule:
    """The whole model with simulated quantisation, on the meta device; `numbers` are those of its weights."""
    graph = capture_whole(config, top_k=recipe.lowering.top_k, debug_logits=recipe.lowering.debug_logits)
    simulate(graph, recipe, config, numbers)
    return graph


def lowered_graph(config: ModelConfig, recipe: Recipe, numbers: Mapping[str, float]) -> GraphModule:
    """The graph of ops that is translated, on the meta device."""
    graph = simulated_graph(config, recipe, numbers)
    run(graph, LOWERING, check_lowered)
    return graph


@dataclass(frozen=True, kw_only=True)
class Signature:
    """What goes into a graph and comes out of it: names, example tensors, and which of their dimensions vary."""

    inputs: tuple[str, ...]
    example: tuple[Tensor, ...]
    shapes: tuple[object, ...]
    outputs: tuple[str, ...]


def cached_graph(config: ModelConfig, recipe: Recipe, numbers: Mapping[str, float]) -> GraphModule:
    """The lowered graph with its caches, on the meta device."""
    graph = lowered_graph(config, recipe, numbers)
    run(graph, [AddCache(recipe.lowering.cache)], check_lowered)
    return graph


def cached_signature(config: ModelConfig, recipe: Recipe) -> Signature:
    """That of the cached graph: six inputs with the window's first slot among them, then keys and values by layer."""
    example, shapes = whole_inputs(config)
    ids, slots = shapes[0], Dim("slots")
    assert isinstance(ids, dict)
    arrays = kept_arrays(quant_plan(recipe, config), config.head_dim)
    past = past_names(config.num_layers, arrays)
    with torch.device("meta"):
        start = torch.zeros(2, dtype=torch.long)
        caches = [
            torch.zeros(2, config.num_kv_heads, 7, width, dtype=dtype)
            for dtype, width in list(arrays.values()) * config.num_layers
        ]
    logits = ("logits",) if recipe.lowering.debug_logits else ()
    return Signature(
        inputs=(*INPUT_NAMES[:2], WRITE_START, *INPUT_NAMES[2:], *past),
        example=(*example[:2], start, *example[2:], *caches),
        shapes=(*shapes[:2], {0: ids[0]}, *shapes[2:], *({0: ids[0], 2: slots} for _ in past)),
        outputs=(*OUTPUT_NAMES, *logits, *present_names(config.num_layers, recipe.lowering.cache, arrays)),
    )


def write_onnx(
    config: ModelConfig, recipe: Recipe, weights: Weights, path: Path, *, on_weight: Callable[[str], None]
) -> dict[str, int]:
    """Write `path` and its one data file; returns how many nodes of each op type of ours stand in it.

    score.onnx is written beside it, and guided.onnx where the recipe asks for it. Raises InputRefused when the sidecar
    files do not hold exactly the weights that the graph reads.
    """
    graph = cached_graph(config, recipe, weights.numbers)
    expected = {name: tuple(value.shape) for name, value in attributes(graph).items()}
    found = {name: weights.shape(name) for name in weights.names}
    if expected != found:
        both = expected.keys() & found.keys()
        raise InputRefused(
            f"the quantised weights do not fit this graph; missing {sorted(expected.keys() - both)}, "
            f"unused {sorted(found.keys() - both)}, of another shape "
            f"{sorted(name for name in both if expected[name] != found[name])}; run `dllmc quantize` again"
        )
    model = translate(graph, cached_signature(config, recipe), recipe.lowering.opset)
    endings = {SCORE: score_model(model)} | ({GUIDED: guided_model(model)} if recipe.lowering.guidance else {})
    _attach_weights(model, weights, on_weight)
    plugins.attach_functions(model)
    _tidy(model, config)
    ir.save(model, path, external_data=f"{path.name}.data", size_threshold_bytes=0, alignment=ALIGNMENT)
    precheck(path)  # before anything opens the data file
    onnx.checker.check_model(str(path))
    for name, ending in endings.items():
        _tidy(ending, config)
        save_beside(ending, path.with_name(name), path)
    counts: dict[str, int] = {}
    for node in model.graph:
        if node.domain == "dllmc":
            counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return counts


def translate(graph: GraphModule, signature: Signature, opset: int) -> ir.Model:
    """ONNX model without weight values."""
    with quiet_exporter():
        program = torch.onnx.export(
            graph,
            signature.example,
            dynamo=True,
            optimize=False,
            verbose=False,
            opset_version=opset,
            input_names=signature.inputs,
            output_names=signature.outputs,
            dynamic_shapes=signature.shapes,
            custom_translation_table=dict(plugins.translation_table().items()),
        )
    assert program is not None
    return program.model


@contextmanager
def quiet_exporter() -> Iterator[None]:
    """The exporter's own chatter is not for the user; its failures are exceptions."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _attach_weights(model: ir.Model, weights: Weights, on_weight: Callable[[str], None]) -> None:
    def lazy(name: str, value: ir.Value) -> ir.LazyTensor:
        def read() -> ir.TensorProtocol:
            on_weight(name)
            return ir.Tensor(weights[name].numpy(), name=name)

        assert value.dtype is not None and value.shape is not None
        return ir.LazyTensor(read, dtype=value.dtype, shape=ir.Shape(value.shape), name=name)

    for name, value in model.graph.initializers.items():
        if name in weights.names:
            value.const_value = lazy(name, value)


def _tidy(model: ir.Model, config: ModelConfig) -> None:
    model.ir_version = IR_VERSION
    model.producer_name, model.producer_version = "dllmc", ""
    model.doc_string = None
    model.graph.name = config.family
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.doc_string = None
        node.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
