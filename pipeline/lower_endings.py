"""The exported graph with other endings, on the same data file.

    score.onnx     DllmcHead(codes, ...) -> DllmcInt8Linear, log_probability     a new input target_ids [B, R]
                   DllmcRecord(logits, ...) -> log_probability
    guided.onnx    DllmcHead(codes, ...) -> DllmcInt8Linear, guide, DllmcRecord  a new input guidance [B / 2]
                   DllmcRecord(logits, ...) -> guide, DllmcRecord

Everything before the ending is the exported graph's own, so all compute the same rows of logits. None of them holds
weights: their tensors point into the data file.
"""

from collections.abc import Sequence
from pathlib import Path

import onnx
import onnx_ir as ir

import plugins
from pipeline.backends.backend import GUIDANCE
from pipeline.backends.precheck import precheck
from pipeline.backends.score import LOGITS, TARGET_IDS, TARGET_LOGP
from plugins.body import FLOAT, INT64
from plugins.guide import GUIDE
from plugins.head import HEAD
from plugins.int8_linear import INT8_LINEAR
from plugins.log_probability import LOG_PROBABILITY
from plugins.record import OUTPUTS, RECORD

HEAD_LOGITS = "head_logits"
LARGEST_INLINE = 1024  # bytes of a constant of the exporter's own, which the data file need not hold


def score_model(model: ir.Model) -> ir.Model:
    """A copy of an exported model, before its functions are attached, that ends in `target_logp` and `logits`.

    `logits` [B, R, V] are biased; outputs other than the record stay behind them.
    """
    scored, end = _copy(model)
    inputs = {value.name: value for value in scored.graph.inputs}
    per_row = ir.Shape(list(inputs["head_index"].shape or ()))
    targets = _value(TARGET_IDS, INT64, per_row)
    nodes, logits = _linear(end)
    warmth = {name: inputs[name] for name in ("logit_bias", "inv_temp")}
    ending = LOG_PROBABILITY.node({"logits": logits, **warmth, "target_ids": targets})
    ending.name = "score"
    rows = ir.Shape([*per_row, *(warmth["logit_bias"].shape or ())])
    _describe(ending.outputs[0], TARGET_LOGP, FLOAT, per_row)
    _describe(ending.outputs[1], LOGITS, FLOAT, rows)
    scored.graph.inputs.append(targets)
    _end(scored.graph, end, [*nodes, ending], ending.outputs)
    return scored


def guided_model(model: ir.Model) -> ir.Model:
    """A copy of such a model whose rows are pairs, with the prompt and without, and whose record has a row a pair."""
    guided, end = _copy(model)
    inputs = {value.name: value for value in guided.graph.inputs}
    strength = _value(GUIDANCE, FLOAT, ir.Shape(["pairs"]))
    nodes, logits = _linear(end)
    combined = GUIDE.node({"logits": logits, "inv_temp": inputs["inv_temp"], "guidance": strength})
    combined.name = "guide"
    for value, name in zip(combined.outputs, ("guided", "first_inv_temp"), strict=True):
        value.name, value.type = name, ir.TensorType(FLOAT)
    rows, first = combined.outputs
    record = RECORD.node(
        {"logits": rows, "logit_bias": inputs["logit_bias"], "inv_temp": first},
        top_k=end.attributes["top_k"].as_int(),
    )
    record.name = "guided_record"
    for new, old in zip(record.outputs, end.outputs, strict=True):
        assert old.name is not None and old.dtype is not None and old.shape is not None
        _describe(new, old.name, old.dtype, ir.Shape(["pairs", *list(old.shape)[1:]]))
    guided.graph.inputs.append(strength)
    _end(guided.graph, end, [*nodes, combined, record], record.outputs)
    return guided


def _copy(model: ir.Model) -> tuple[ir.Model, ir.Node]:
    copy = model.clone()
    (end,) = [node for node in copy.graph if node.op_type in (HEAD.onnx_type, RECORD.onnx_type)]
    return copy, end


def _linear(end: ir.Node) -> tuple[list[ir.Node], ir.Value]:
    """The nodes that make the logits of an ending, and the logits."""
    if end.op_type == RECORD.onnx_type:
        logits = end.inputs[0]
        assert logits is not None
        logits.name = HEAD_LOGITS  # where it was an output for debugging, it has the name of the ending's own
        return [], logits
    given = dict(zip(HEAD.inputs, end.inputs, strict=True))
    operands = {name: value for name in INT8_LINEAR.inputs if (value := given.get(name)) is not None}
    linear = INT8_LINEAR.node(operands, layout=end.attributes["layout"].as_int())
    linear.name = "head_linear"
    (logits,) = linear.outputs
    logits.name, logits.type = HEAD_LOGITS, ir.TensorType(FLOAT)
    return [linear], logits


def _value(name: str, dtype: ir.DataType, shape: ir.Shape) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=shape)


def _describe(value: ir.Value, name: str, dtype: ir.DataType, shape: ir.Shape) -> None:
    value.name, value.type, value.shape = name, ir.TensorType(dtype), shape


def _end(graph: ir.Graph, end: ir.Node, nodes: list[ir.Node], outputs: Sequence[ir.Value]) -> None:
    """Put `nodes` in the place of the ending; what else comes out of the graph stays behind their outputs."""
    kept = [value for value in graph.outputs if value.name not in (*OUTPUTS, LOGITS)]
    graph.outputs[:] = [*outputs, *kept]
    graph.insert_before(end, nodes)
    graph.remove(end, safe=True)


def save_beside(model: ir.Model, path: Path, exported: Path) -> None:
    """Write `path` without weight bytes: every weight is where `exported`, in the same folder, has its own.

    Raises ValueError for a weight that `exported` does not hold in that shape.
    """
    plugins.attach_functions(model)
    places = {name: value.const_value for name, value in ir.load(exported).graph.initializers.items()}
    for name, value in model.graph.initializers.items():
        place = places.get(name)
        if isinstance(place, ir.ExternalTensor) and place.shape == value.shape and place.dtype == value.dtype:
            value.const_value = place
        elif value.const_value is None or value.const_value.nbytes > LARGEST_INLINE:
            raise ValueError(f"{exported.name} holds no weight {name} of {value.dtype} {value.shape}")
    ir.save(model, path)
    precheck(path)
    onnx.checker.check_model(str(path))
