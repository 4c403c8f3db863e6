"""One op in two runtimes: its torch reference, and its function body in stock ONNX Runtime."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx.inliner import inline_local_functions
from onnx.reference import ReferenceEvaluator

from plugins import OPS, attach_functions
from plugins.op import DOMAIN, PLUGIN

Arrays = dict[str, np.ndarray]
FED = (
    *("x", "codes", "scale", "zero", "residual", "state", "logits", "logit_bias", "inv_temp", "target_ids"),
    *("past", "new", "write_start", "q", "k", "v", "kv_len", "guidance"),
)


def call_reference(name: str, attributes: dict[str, Any], inputs: Arrays) -> Arrays:
    """Outputs of the torch op by ONNX output name."""
    op = OPS[name]
    tensors = {key: torch.from_numpy(value) for key, value in inputs.items()}
    absent: dict[str, None] = {key: None for key in op.inputs if key not in inputs}
    result = getattr(torch.ops.dllmc, name)(**{**absent, **tensors}, **attributes)
    result = result if isinstance(result, tuple) else (result,)
    defaults = {n: p.default for n, p in op.signature.parameters.items()}
    numbers = op.attributes({**defaults, **absent, **tensors, **attributes})
    return dict(zip(op.outputs(numbers), (tensor.numpy() for tensor in result), strict=False))


def build_model(name: str, attributes: dict[str, Any], inputs: Arrays) -> ir.Model:
    """A model of one node; activations are graph inputs of unknown sizes, everything else is an initialiser."""
    op = OPS[name]
    defaults = {n: p.default for n, p in op.signature.parameters.items()}
    absent = dict.fromkeys(key for key in op.inputs if key not in inputs)
    numbers = op.attributes({**defaults, **absent, **inputs, **attributes})
    values = {}
    for key in op.present(numbers):
        tensor = ir.Tensor(inputs[key], name=key)
        if key in FED and not (key == "codes" and name == "dequantize"):
            shape = ir.Shape([f"{key}_{axis}" for axis in range(inputs[key].ndim)])
            values[key] = ir.Value(name=key, type=ir.TensorType(tensor.dtype), shape=shape)
        else:
            values[key] = ir.Value(name=key, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
    outputs = [ir.Value(name=key) for key in op.outputs(numbers)]
    known = call_reference(name, attributes, inputs)
    node_attributes = ir.convenience.convert_attributes({**numbers, **PLUGIN})
    node = ir.Node(
        DOMAIN, str(op.onnx_type), list(values.values()), node_attributes, outputs=outputs, name=f"node_{name}"
    )
    nodes, results = [node], []
    for output in outputs:
        array = known[output.name or ""]
        output.type = ir.TensorType(ir.DataType.from_numpy(array.dtype))
        if output.name in op.narrow(numbers):  # numpy has no 4-bit type to receive
            widen = ir.Node("", "Cast", [output], {"to": ir.AttrInt64("to", ir.DataType.INT8)}, name="widen")
            widen.outputs[0].name, output.name = output.name, "narrow"
            widen.outputs[0].type = ir.TensorType(ir.DataType.INT8)
            nodes.append(widen)
            results.append(widen.outputs[0])
        else:
            results.append(output)
    fed = [value for value in values.values() if value.const_value is None]
    kept = [value for value in values.values() if value.const_value is not None]
    graph = ir.Graph(fed, results, nodes=nodes, initializers=kept, opset_imports={"": 24}, name="one_op")
    model = ir.Model(graph, ir_version=11)
    assert attach_functions(model) == 1
    assert model.opset_imports == {"": 24, DOMAIN: 1}
    return model


def open_session(model: ir.Model, fold: bool = True) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    disabled = [] if fold else ["ConstantFolding"]
    data = ir.to_proto(model).SerializeToString()
    return onnxruntime.InferenceSession(data, options, ["CPUExecutionProvider"], disabled_optimizers=disabled)


def _feeds(model: ir.Model, inputs: Arrays) -> Arrays:
    return {value.name or "": inputs[value.name or ""] for value in model.graph.inputs}


Both = Callable[..., tuple[Arrays, Arrays]]


@pytest.fixture
def both() -> Both:
    """Call as both(op, attributes, inputs, fold=True): outputs of (torch, ONNX Runtime) by name."""

    def run(name: str, attributes: dict[str, Any], inputs: Arrays, fold: bool = True) -> tuple[Arrays, Arrays]:
        model = build_model(name, attributes, inputs)
        session = open_session(model, fold)
        names = [output.name for output in session.get_outputs()]
        found = session.run(None, _feeds(model, inputs))
        return call_reference(name, attributes, inputs), dict(zip(names, found, strict=True))

    return run


@pytest.fixture
def by_onnx_reference() -> Callable[[str, dict[str, Any], Arrays], Arrays]:
    """Outputs of the inlined body in `onnx.reference`, which resolves no overloads itself."""

    def run(name: str, attributes: dict[str, Any], inputs: Arrays) -> Arrays:
        model = build_model(name, attributes, inputs)
        proto = inline_local_functions(ir.to_proto(model))
        assert not proto.functions
        found = ReferenceEvaluator(proto).run(None, _feeds(model, inputs))
        return dict(zip((value.name or "" for value in model.graph.outputs), found, strict=True))

    return run


@pytest.fixture
def checked_file(tmp_path: Path) -> Callable[[ir.Model], Path]:
    """Save with external data and pass onnx.checker."""

    def save(model: ir.Model) -> Path:
        path = tmp_path / "model.onnx"
        ir.save(model, path, external_data="model.onnx.data")
        onnx.checker.check_model(path)
        return path

    return save
