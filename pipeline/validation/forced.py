"""Whole passes with the quantisers' results fed in from torch: what is left is float rounding, and that has a bound.

In a free run a value that lies at a half may round differently on both sides; one code then moves by a step and a row's
logits with it, which says nothing about right or wrong. Here every `DllmcQuantize` of the ONNX model is replaced by
inputs that carry torch's codes, and what entered it becomes an output to compare: each stretch of the graph between two
quantisers is checked on equal integers, over all batches, lengths and noise levels. The quantisers are in `nodes`.

A difference is taken in units of max(|y|, rms of y), that of `tail` of |y| itself. The tolerance of each place is

    MARGIN * max(2 u, largest difference that the rounding errors of `rounding` make there)

on the longest passes, so a stretch of many layers (a graph with float linears is one) has that of its whole depth.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime
import torch
from torch import Tensor
from torch.fx import GraphModule

from pipeline.backends.backend import OUTPUTS, WRITE_START, Feeds, Record
from pipeline.backends.ort import folds, session_options
from pipeline.backends.ort_cache import layout_of
from pipeline.backends.precheck import precheck
from pipeline.runner.self_test import compare as compare_records
from pipeline.validation.feeds import is_banned
from pipeline.validation.rounding import UNIT, Rounded

FORCED = "model.forced.onnx"
QUANTIZE = "DllmcQuantize"
# For canvases with larger errors than those it was measured on, and two machines that both round.
MARGIN = 2.0

Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The place of one pass that is worst for its tolerance; both are in units of its tensor's magnitude."""

    largest: float
    tolerance: float
    place: str

    @property
    def share(self) -> float:
        """Of the tolerance; NaN for NaN."""
        return self.largest / self.tolerance


class ForcedModel:
    """The ONNX model without its quantisers, as a session; its file is gone once it is open."""

    def __init__(self, path: Path, graph: GraphModule, longest: Sequence[Feeds], *, threads: int | None = None) -> None:
        """`longest` are the passes that tolerances are taken on."""
        self.graph = graph
        model = ir.load(path)
        self.quantisers = [node for node in model.graph if node.op_type == QUANTIZE]
        self.sizes = [len(node.outputs) for node in self.quantisers]
        for number, node in enumerate(self.quantisers):
            _force(model, node, number)
        self.path = path.with_name(FORCED)
        with _short_lived(self.path):
            onnx.save(ir.serde.serialize_model(model), self.path)
            precheck(self.path)
            self.session = onnxruntime.InferenceSession(
                self.path,
                session_options(threads),
                providers=["CPUExecutionProvider"],
                disabled_optimizers=[] if folds(path) else ["ConstantFolding"],
            )
        self.layout = layout_of(self.session.get_inputs(), self.session.get_outputs(), f"{path}")
        self.tolerance = self._tolerances(longest)

    @torch.no_grad()
    def _tolerances(self, longest: Sequence[Feeds]) -> dict[str, float]:
        largest: dict[str, float] = {}
        for number, feeds in enumerate(longest):
            exact = Rounded(self.graph)
            expected = _values(exact, exact.run(*_tensors(feeds)))
            moved = Rounded(self.graph, draw=torch.Generator().manual_seed(number), codes=exact.left)
            found = _values(moved, moved.run(*_tensors(feeds)))
            for name, array in expected.items():
                if name != "top_ids":
                    largest[name] = max(largest.get(name, 2 * UNIT), _difference(name, found[name], array))
        return {name: MARGIN * value for name, value in largest.items()}

    @torch.no_grad()
    def compare(self, feeds: Feeds) -> Comparison:
        """Run torch freely and ONNX Runtime on torch's codes; every float that both compute is compared."""
        reference = Rounded(self.graph)
        expected = _values(reference, reference.run(*_tensors(feeds)))
        inputs = feeds.as_dict() | {WRITE_START: np.zeros_like(feeds.kv_len)}
        inputs |= self.layout.empty(*feeds.input_ids.shape)
        for number, tensors in enumerate(reference.left):
            inputs |= {_name(number, place): t.numpy() for place, t in enumerate(tensors[: self.sizes[number]])}
        found = dict(zip(expected, self.session.run(list(expected), inputs), strict=True))
        checks = [
            Comparison(largest=_difference(name, found[name], array), tolerance=self.tolerance[name], place=name)
            for name, array in expected.items()
            if name != "top_ids"
        ]
        wrong = _wrong_ids(found, expected, self.tolerance["top_logits"])
        checks.append(Comparison(largest=np.inf if wrong else 0.0, tolerance=1.0, place="top_ids"))
        # NaN is the largest of all, or it would hide.
        return max(checks, key=lambda check: np.nan_to_num(check.share, nan=np.inf))


@contextmanager
def _short_lived(path: Path) -> Iterator[None]:
    """Whatever happens, Ctrl-C included, the file does not stay."""
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _tensors(feeds: Feeds) -> list[Tensor]:
    return [torch.from_numpy(array) for array in feeds.as_dict().values()]


def _values(run: Rounded, outputs: Sequence[Tensor]) -> dict[str, Array]:
    """All that is compared, by its name in the forced model."""
    values = {name: tensor.numpy() for name, tensor in zip(OUTPUTS, outputs, strict=False)}
    return values | {f"entered_{number}": tensor.numpy() for number, tensor in enumerate(run.entered)}


def _difference(name: str, found: Array, expected: Array) -> float:
    found, expected = found.astype(np.float64), expected.astype(np.float64)
    if name == "top_logits":
        chosen = ~(is_banned(found) & is_banned(expected))
        found, expected = found[chosen], expected[chosen]
    unit = np.abs(expected)
    if name != "tail":  # near 0 it says how sure the model is, and every digit counts
        unit = np.maximum(unit, np.sqrt(np.mean(np.square(expected))))
    difference = np.abs(found - expected) / np.maximum(unit, np.finfo(np.float32).tiny)
    return float(np.max(difference, initial=0.0))


def _wrong_ids(found: dict[str, Array], expected: dict[str, Array], tolerance: float) -> int:
    """Ids that differ where the logits leave no doubt; those of equal logits may swap, and banned ids too."""
    banned = is_banned(found["top_logits"]) & is_banned(expected["top_logits"])
    ours, theirs = (
        Record(**{name: values[name] for name in OUTPUTS} | {"top_ids": np.where(banned, -1, values["top_ids"])})
        for values in (found, expected)
    )
    scale = float(np.max(np.abs(expected["top_logits"][~banned]), initial=0.0))
    return compare_records("", ours, theirs, tolerance * scale).wrong_ids


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
        assert old.dtype is not None
        element = ir.DataType.INT8 if old.dtype == ir.DataType.INT4 else old.dtype
        fed = ir.Value(name=_name(number, place), type=ir.TensorType(element), shape=old.shape)
        model.graph.inputs.append(fed)
        cast = ir.node("Cast", [fed], attributes={"to": old.dtype})
        model.graph.insert_before(node, cast)
        made = cast.outputs[0]
        made.name, made.type, made.shape = old.name, old.type, old.shape  # a window's codes are outputs of the graph
        old.replace_all_uses_with(made, replace_graph_outputs=True)
    model.graph.remove(node, safe=True)
