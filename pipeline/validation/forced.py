"""Whole passes with the quantisers' results fed in from torch: what is left is float rounding, and that has a bound.

In a free run a value that lies at a half may round differently on both sides; one code then moves by a step and a row's
logits with it, which says nothing about right or wrong. Here every `DllmcQuantize` of the ONNX model is replaced by
inputs that carry torch's codes, and what entered it becomes an output to compare: each stretch of the graph between two
quantisers is checked on equal integers, over all batches, lengths and noise levels. The quantisers are in `nodes`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime
import torch
from torch.fx import GraphModule, Interpreter, Node

from pipeline.backends.backend import INPUTS, OUTPUTS, Feeds, Record
from pipeline.backends.precheck import precheck
from pipeline.runner.self_test import compare as compare_records

FORCED = "model.forced.onnx"
QUANTIZE = "DllmcQuantize"
# A stretch between two quantisers holds the sums of one attention or one norm; half a unit for each rounding.
STRETCH_ROUNDINGS = 256
TOLERANCE = STRETCH_ROUNDINGS * 2.0**-24

Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Largest difference of one pass, in units of the largest magnitude of its tensor, and where it was."""

    largest: float
    place: str


class _Quantisers(Interpreter):
    """Remembers what entered and left every quantiser."""

    def __init__(self, graph: GraphModule) -> None:
        super().__init__(graph)
        self.entered: list[Array] = []
        self.left: list[list[Array]] = []

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if n.op == "call_function" and n.target is torch.ops.dllmc.quantize.default:
            args, _ = self.fetch_args_kwargs_from_env(n)
            self.entered.append(args[0].numpy())
            self.left.append([tensor.numpy() for tensor in result if tensor.numel()])
        return result


class ForcedModel:
    """The ONNX model without its quantisers, as a session; its file is gone once it is open."""

    def __init__(self, path: Path, graph: GraphModule) -> None:
        self.graph = graph
        model = ir.load(path)
        self.quantisers = [node for node in model.graph if node.op_type == QUANTIZE]
        self.sizes = [len(node.outputs) for node in self.quantisers]
        for number, node in enumerate(self.quantisers):
            _force(model, node, number)
        self.path = path.with_name(FORCED)
        onnx.save(ir.serde.serialize_model(model), self.path)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
        try:
            precheck(self.path)
            self.session = onnxruntime.InferenceSession(self.path, options, providers=["CPUExecutionProvider"])
        finally:
            self.path.unlink()

    @torch.no_grad()
    def compare(self, feeds: Feeds) -> Comparison:
        """Run torch freely and ONNX Runtime on torch's codes; every float that both compute is compared."""
        reference = _Quantisers(self.graph)
        record = reference.run(*(torch.from_numpy(array) for array in feeds.as_dict().values()))
        inputs = dict(zip(INPUTS, feeds.as_dict().values(), strict=True))
        for number, arrays in enumerate(reference.left):
            inputs |= {_name(number, place): array for place, array in enumerate(arrays[: self.sizes[number]])}
        wanted = [*OUTPUTS, *(f"entered_{number}" for number in range(len(reference.entered)))]
        found = dict(zip(wanted, self.session.run(wanted, inputs), strict=True))
        expected = dict(zip(OUTPUTS, (tensor.numpy() for tensor in record), strict=False))
        wrong_ids = _wrong_ids({name: found[name] for name in OUTPUTS}, {name: expected[name] for name in OUTPUTS})
        expected |= {f"entered_{number}": array for number, array in enumerate(reference.entered)}
        distances = {name: _relative(found[name], array) for name, array in expected.items() if name != "top_ids"}
        distances["top_ids"] = np.inf if wrong_ids else 0.0
        # NaN is the largest of all, or it would hide.
        place = max(distances, key=lambda name: np.nan_to_num(distances[name], nan=np.inf))
        return Comparison(largest=distances[place], place=place)


def _relative(found: Array, expected: Array) -> float:
    difference = np.abs(found.astype(np.float64) - expected.astype(np.float64)).max()
    return float(difference / max(float(np.abs(expected).max()), 1.0))


def _wrong_ids(found: dict[str, Array], expected: dict[str, Array]) -> int:
    """Ids that differ where the logits leave no doubt; those of equal logits may swap."""
    scale = max(float(np.abs(expected["top_logits"]).max()), 1.0)
    return compare_records("", Record(**found), Record(**expected), TOLERANCE * scale).wrong_ids


def _name(number: int, place: int) -> str:
    return f"left_{number}_{place}"


def _force(model: ir.Model, node: ir.Node, number: int) -> None:
    entering = node.inputs[0]
    assert entering is not None
    entered = ir.node("Identity", [entering])
    entered.outputs[0].name, entered.outputs[0].type = f"entered_{number}", ir.TensorType(ir.DataType.FLOAT)
    model.graph.insert_before(node, entered)
    model.graph.outputs.append(entered.outputs[0])
    for place, old in enumerate(node.outputs):
        narrow = old.dtype == ir.DataType.INT4
        element = ir.DataType.INT8 if narrow else old.dtype
        assert element is not None
        fed = ir.Value(name=_name(number, place), type=ir.TensorType(element), shape=old.shape)
        model.graph.inputs.append(fed)
        if narrow:
            cast = ir.node("Cast", [fed], attributes={"to": ir.DataType.INT4})
            model.graph.insert_before(node, cast)
            fed = cast.outputs[0]
        old.replace_all_uses_with(fed)
    model.graph.remove(node, safe=True)
