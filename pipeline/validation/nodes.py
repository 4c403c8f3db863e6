"""Each of our nodes alone: ONNX Runtime on the file's own node and weights against torch, on equal inputs.

Integers are equal everywhere. Codes of a `DllmcQuantize` that computes floats first (norm, TAC, transform) may differ
by one, in at most one place in a thousand of all passes, since its float sums may round differently on a value that
lies at a half. Floats are equal too, but for the scales of such a node, SwiGLU and the head's sums: there two values
may differ by SAFETY sqrt(n) u of their magnitude, n roundings deep (the standard model of `rounding`).
"""

import math
from collections.abc import Sequence
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
from pipeline.backends.backend import Feeds
from pipeline.backends.ort import session_options
from pipeline.validation.feeds import is_banned
from pipeline.validation.rounding import FUNCTION, UNIT
from plugins.op import DOMAIN, Op

CODE_SHARE = 1e-3
# Both sides round (the root of 2), and the largest of millions of values is at 5.5 deviations.
SAFETY = 8.0

Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class NodeCheck:
    """What was compared on one node, summed over the passes; `largest` in code steps or units of magnitude."""

    node: str
    op: str
    places: int
    codes_off: int
    most_off: int
    largest: float
    close: bool

    @property
    def passed(self) -> bool:
        return self.close and self.codes_off <= self.most_off


class _Checks(Interpreter):
    """Checks every call of our ops as soon as it ran, against the node of the file that has its place."""

    def __init__(self, graph: GraphModule, ops: dict[object, Op], model: ir.Model, threads: int | None) -> None:
        super().__init__(graph)
        self.ops, self.model, self.threads = ops, model, threads
        self.nodes = iter([node for node in model.graph if node.domain == DOMAIN])
        self.found: list[NodeCheck] = []

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if n.op == "call_function" and (op := self.ops.get(n.target)) is not None:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            outputs = list(result) if isinstance(result, tuple | list) else [result]
            arguments = op.arguments(*args, **kwargs)
            self.found.append(_check(self.model, next(self.nodes), op, arguments, outputs, self.threads))
        return result


@torch.no_grad()
def check_nodes(
    path: Path, graph: GraphModule, passes: Sequence[Feeds], *, threads: int | None = None
) -> list[NodeCheck]:
    """Run `graph` (lowered, with weights) on every pass and each of our nodes in the model at `path` on what it met."""
    ops: dict[object, Op] = {op.overload: op for op in plugins.OPS.values() if op.onnx_type and not op.inlined}
    model = ir.load(path)
    expected = [ops[node.target].onnx_type for node in graph.graph.nodes if node.target in ops]
    found = [node.op_type for node in model.graph if node.domain == DOMAIN]
    if found != expected:
        raise ValueError(f"{path.name} has other nodes than the graph: {len(found)} against {len(expected)}")
    checks = []
    for feeds in passes:
        run = _Checks(graph, ops, model, threads)
        run.run(*(torch.from_numpy(array) for array in feeds.as_dict().values()))
        checks.append(run.found)
    return [_summed(each) for each in zip(*checks, strict=True)]


def _summed(checks: Sequence[NodeCheck]) -> NodeCheck:
    places = sum(check.places for check in checks)
    return NodeCheck(
        node=checks[0].node,
        op=checks[0].op,
        places=places,
        codes_off=sum(check.codes_off for check in checks),
        most_off=int(CODE_SHARE * places) if checks[0].most_off else 0,
        largest=float(np.max([check.largest for check in checks])),  # Python's max hides a NaN that is not the first
        close=all(check.close for check in checks),
    )


def _check(
    model: ir.Model, node: ir.Node, op: Op, arguments: dict[str, Any], expected: list[Tensor], threads: int | None
) -> NodeCheck:
    attributes = op.attributes(arguments)
    names = op.present(attributes)
    single, feeds = _single_node_model(model, node, [(name, arguments[name]) for name in names])
    content = ir.serde.serialize_model(single).SerializeToString()
    session = onnxruntime.InferenceSession(content, session_options(threads), providers=["CPUExecutionProvider"])
    results = session.run(None, feeds)
    pairs = [(r.astype(np.float64), e.numpy().astype(np.float64)) for r, e in zip(results, expected, strict=False)]
    places = sum(r.size for r, _ in pairs)
    roundings = _roundings(op, arguments)
    tolerance = SAFETY * math.sqrt(roundings) * UNIT
    off, steps = 0, 0.0
    if op.name == "quantize":
        codes, true_codes = pairs.pop(0)
        off = int((codes != true_codes).sum())
        steps = float(np.abs(codes - true_codes).max())
    if op.name == "head":
        # Ids may swap where two logits are equal to the last places; `forced` compares those of clear logits.
        pairs = pairs[1:]
    differences = [_relative(r, e) for r, e in pairs]
    return NodeCheck(
        node=_name(node),
        op=node.op_type,
        places=places,
        codes_off=off,
        most_off=places if roundings else 0,
        largest=float(np.max([steps, *differences])),
        close=steps <= 1 and all(difference <= tolerance for difference in differences),
    )


def _roundings(op: Op, arguments: dict[str, Any]) -> int:
    """n of the docstring, sums of these ops running in float64; 0 where both sides do the same operations in order."""
    if op.name == "quantize":
        stages = [arguments[name] for name in ("norm_weight", "tac_matrix", "left")]
        return 4 * sum(stage is not None for stage in stages)  # root, division and product; or sum and bias
    if op.name == "head":
        return 2
    if op.name == "rotate":
        return int(arguments["blocks"].shape[-1])
    return FUNCTION + 1 if arguments["swiglu"] else 0


def _relative(found: Array, expected: Array) -> float:
    """Largest difference in units of max(|y|, rms of y); NaN stays NaN and so fails every bound."""
    chosen = ~(is_banned(found) & is_banned(expected))
    found, expected = found[chosen], expected[chosen]
    unit = np.maximum(np.abs(expected), np.sqrt(np.mean(np.square(expected)))) if expected.size else expected
    return float(np.max(np.abs(found - expected) / np.maximum(unit, 1e-30), initial=0.0))


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
