"""Each of our nodes alone: ONNX Runtime on the file's own node and weights against torch, on equal inputs.

Integers are equal everywhere. Codes of a `DllmcQuantize` that computes floats first (norm, TAC, transform) may differ
by one, in at most one place in a thousand, since its float sums may round differently on a value that lies at a half.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime
import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

import plugins
from plugins.op import DOMAIN, Op

CODE_SHARE = 1e-3
# A float epilogue (SwiGLU's exponential, the head's sums over the vocabulary) may differ by the last places of float32.
FLOAT_TOLERANCE = 64 * 2.0**-24

Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class NodeCheck:
    """What was compared on one node; `passed` follows from the other fields."""

    node: str
    op: str
    places: int
    codes_off: int
    largest: float
    passed: bool


class _Calls(Interpreter):
    """Remembers the arguments and results of every call of our ops."""

    def __init__(self, graph: GraphModule, ops: dict[object, Op]) -> None:
        super().__init__(graph)
        self.ops = ops
        self.found: list[tuple[Op, dict[str, Any], list[Tensor]]] = []

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if n.op == "call_function" and (op := self.ops.get(n.target)) is not None:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            bound = op.signature.bind(*args, **kwargs)
            bound.apply_defaults()
            outputs = list(result) if isinstance(result, tuple | list) else [result]
            self.found.append((op, dict(bound.arguments), outputs))
        return result


@torch.no_grad()
def check_nodes(path: Path, graph: GraphModule, inputs: list[Tensor]) -> list[NodeCheck]:
    """Run `graph` (lowered, with weights) on `inputs` and each of our nodes in the model at `path` on what it met."""
    ops: dict[object, Op] = {op.overload: op for op in plugins.OPS.values() if op.onnx_type and not op.inlined}
    calls = _Calls(graph, ops)
    calls.run(*inputs)
    model = ir.load(path)
    nodes = [node for node in model.graph if node.domain == DOMAIN]
    expected = [op.onnx_type for op, _, _ in calls.found]
    if [node.op_type for node in nodes] != expected:
        raise ValueError(f"{path.name} has other nodes than the graph: {len(nodes)} against {len(expected)}")
    return [_check(model, node, *call) for node, call in zip(nodes, calls.found, strict=True)]


def _check(model: ir.Model, node: ir.Node, op: Op, arguments: dict[str, Any], expected: list[Tensor]) -> NodeCheck:
    attributes = op.attributes(arguments)
    names = op.present(attributes)
    single, feeds = _single_node_model(model, node, [(name, arguments[name]) for name in names])
    content = ir.serde.serialize_model(single).SerializeToString()
    results = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"]).run(None, feeds)
    pairs = [(r.astype(np.float64), e.numpy().astype(np.float64)) for r, e in zip(results, expected, strict=False)]
    places = sum(r.size for r, _ in pairs)
    if op.name == "quantize":
        (codes, true_codes), *rest = pairs
        off = int((codes != true_codes).sum())
        computes = any(attributes[flag] for flag in ("has_norm", "has_tac", "has_transform"))
        largest = float(np.max([np.abs(codes - true_codes).max(), *(_relative(r, e) for r, e in rest)]))
        close = all(_relative(r, e) <= (FLOAT_TOLERANCE if computes else 0.0) for r, e in rest)
        allowed = CODE_SHARE * codes.size if computes else 0
        passed = close and off <= allowed and bool(np.abs(codes - true_codes).max() <= 1)
        return NodeCheck(
            node=_name(node), op=node.op_type, places=places, codes_off=off, largest=largest, passed=passed
        )
    if op.name == "head":
        # Ids may swap where two logits are equal to the last places; the logits themselves are compared.
        pairs = pairs[1:]
    exact = op.name != "head" and not attributes["swiglu"]
    largest = float(np.max([_relative(r, e) for r, e in pairs]))  # Python's max hides a NaN that is not the first
    passed = largest <= (0.0 if exact else FLOAT_TOLERANCE)
    return NodeCheck(node=_name(node), op=node.op_type, places=places, codes_off=0, largest=largest, passed=passed)


def _relative(found: Array, expected: Array) -> float:
    """Largest difference in units of the largest magnitude expected; NaN stays NaN and so fails every bound."""
    return float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-30))


def _name(node: ir.Node) -> str:
    weights = [value.name for value in node.inputs if value is not None and value.is_initializer() and value.name]
    codes = [name.rpartition(".")[0] for name in weights if name.endswith(".codes")]
    return codes[0] if codes else f"{node.op_type} before {node.outputs[0].name}"


def _single_node_model(
    model: ir.Model, node: ir.Node, arguments: list[tuple[str, Tensor]]
) -> tuple[ir.Model, dict[str, Array]]:
    """`node` with its own weights and function, the rest of its inputs fed; int4 passes the border as int8."""
    nodes: list[ir.Node] = []
    inputs, initializers, made, feeds = [], [], [], {}
    for (name, tensor), value in zip(arguments, node.inputs, strict=True):
        assert value is not None
        if value.is_initializer():
            assert value.const_value is not None
            weight = ir.Tensor(value.const_value.numpy(), dtype=value.const_value.dtype, name=value.name)
            copy = ir.Value(name=value.name, type=value.type, shape=value.shape, const_value=weight)
            initializers.append(copy)
        else:
            feeds[name] = tensor.numpy()
            element = ir.DataType.from_numpy(feeds[name].dtype)
            copy = ir.Value(name=name, type=ir.TensorType(element), shape=ir.Shape(feeds[name].shape))
            inputs.append(copy)
            if value.dtype == ir.DataType.INT4:
                cast = ir.node("Cast", [copy], attributes={"to": ir.DataType.INT4})
                nodes.append(cast)
                copy = cast.outputs[0]
        made.append(copy)
    call = ir.Node(
        node.domain,
        node.op_type,
        made,
        node.attributes.values(),
        overload=node.overload,
        num_outputs=len(node.outputs),
    )
    nodes.append(call)
    outputs = []
    for index, (value, old) in enumerate(zip(call.outputs, node.outputs, strict=True)):
        value.name, value.type = f"out_{index}", old.type
        if old.dtype == ir.DataType.INT4:
            cast = ir.node("Cast", [value], attributes={"to": ir.DataType.INT8})
            nodes.append(cast)
            value, cast.outputs[0].name = cast.outputs[0], f"codes_{index}"
            value.type = ir.TensorType(ir.DataType.INT8)
        outputs.append(value)
    graph = ir.Graph(
        inputs, outputs, nodes=nodes, initializers=initializers, opset_imports=model.opset_imports, name="node"
    )
    function = model.functions[node.op_identifier()]
    return ir.Model(graph, ir_version=model.ir_version, functions=[function.clone()]), feeds
