"""score.onnx: the exported graph with another ending, how likely given ids are, on the same data file.

    DllmcHead(codes, ...)       ->  DllmcInt8Linear, log_probability
    DllmcRecord(logits, ...)    ->  log_probability

Everything before the ending is the exported graph's own, so both compute the same rows of logits; a new last input
`target_ids` [B, R] says whose likelihood is asked. It holds no weights: its tensors point into the data file.
"""

from pathlib import Path

import onnx
import onnx_ir as ir

import plugins
from pipeline.backends.precheck import precheck
from pipeline.backends.score import LOGITS, TARGET_IDS, TARGET_LOGP
from plugins.body import FLOAT, INT64
from plugins.head import HEAD
from plugins.int8_linear import INT8_LINEAR
from plugins.log_probability import LOG_PROBABILITY
from plugins.record import OUTPUTS, RECORD

LARGEST_INLINE = 1024  # bytes of a constant of the exporter's own, which the data file need not hold


def score_model(model: ir.Model) -> ir.Model:
    """A copy of an exported model, before its functions are attached, that ends in `target_logp` and `logits`.

    `logits` [B, R, V] are biased; outputs other than the record stay behind them.
    """
    scored = model.clone()
    graph = scored.graph
    (end,) = [node for node in graph if node.op_type in (HEAD.onnx_type, RECORD.onnx_type)]
    values = {value.name: value for value in graph.inputs}
    per_row = ir.Shape(list(values["head_index"].shape or ()))
    targets = ir.Value(name=TARGET_IDS, type=ir.TensorType(INT64), shape=per_row)
    nodes, logits = _linear(end)
    ending = LOG_PROBABILITY.node(
        {
            "logits": logits,
            "logit_bias": values["logit_bias"],
            "inv_temp": values["inv_temp"],
            "target_ids": targets,
        }
    )
    found, biased = ending.outputs
    found.name, found.type, found.shape = TARGET_LOGP, ir.TensorType(FLOAT), per_row
    biased.name, biased.type = LOGITS, ir.TensorType(FLOAT)
    biased.shape = ir.Shape([*per_row, *(values["logit_bias"].shape or ())])
    graph.inputs.append(targets)
    kept = [value for value in graph.outputs if value.name not in (*OUTPUTS, LOGITS)]
    graph.outputs[:] = [found, biased, *kept]
    graph.insert_before(end, [*nodes, ending])
    graph.remove(end, safe=True)
    return scored


def _linear(end: ir.Node) -> tuple[list[ir.Node], ir.Value]:
    """The nodes that make the logits of an ending, and the logits."""
    if end.op_type == RECORD.onnx_type:
        logits = end.inputs[0]
        assert logits is not None
        return [], logits
    given = dict(zip(HEAD.inputs, end.inputs, strict=True))
    operands = {name: value for name in INT8_LINEAR.inputs if (value := given.get(name)) is not None}
    linear = INT8_LINEAR.node(operands, layout=end.attributes["layout"].as_int())
    (logits,) = linear.outputs
    logits.name, logits.type = f"{end.name}/logits", ir.TensorType(FLOAT)
    return [linear], logits


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
