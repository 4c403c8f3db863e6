"""Every node that `lower` writes is one that a plugin takes, and the plugin gives what the node's reference gives.

The TensorRT profile changes two things in a node: codes of 4 bits are packed two a byte, and weights stand in fragment
order. Sizes are small ones that the kernels are made for; a random model on random canvases makes the inputs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter
from torch.fx import Node as FxNode

from bench.gpu.compare import compare_call
from passes.methods import METHODS
from passes.methods.method import INTEGER
from pipeline.capture import materialise
from pipeline.lower import lowered_graph, write_onnx
from pipeline.models.checkpoint import Checkpoint, open_checkpoint
from pipeline.quantize import Weights, write_weights
from pipeline.recipe import Recipe
from plugins import OPS
from plugins.op import DOMAIN, PLUGIN, Op
from tests.pipeline.fitted import feeds_of, quick_recipe, random_states
from tests.pipeline.models.folders import write_folder
from tests.plugins.tensorrt.harness import DATA_TYPES, Harness
from tests.plugins.tensorrt.nodes import Node, node

Bits = tuple[int, int]

SIZES: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 384, "num_layers": 1, "head_dim": 64}
BATCH, QUERY = 2, 5
GROUPS, ZEROS = ("linear.w_group=128", "linear.a_group=128"), ("linear.symmetric=false",)
FINE = (*GROUPS, *ZEROS)
INTEGER_METHODS = [name for name, method in METHODS.items() if method.formats & INTEGER]

BY_TYPE = {op.onnx_type: op for op in OPS.values() if op.onnx_type and not op.inlined}
FILE_TYPES = {ir.DataType.FLOAT: torch.float32, ir.DataType.INT4: torch.int8, ir.DataType.INT8: torch.int8,
              ir.DataType.INT32: torch.int32, ir.DataType.INT64: torch.int64}  # fmt: skip
EITHER_FLOAT = [0, 1]  # TensorRT's FLOAT and HALF


@dataclass(frozen=True)
class Call:
    """One of our ops as a lowered graph calls it."""

    name: str
    op: Op
    arguments: dict[str, Any]

    @property
    def inputs(self) -> dict[str, Tensor]:
        """The tensors that its node reads, in order."""
        return {name: self.arguments[name] for name in self.op.present(self.op.attributes(self.arguments))}


@dataclass(frozen=True)
class Case:
    """What one recipe makes of the model."""

    recipe: Recipe
    weights: Weights
    calls: list[Call]


class Calls(Interpreter):
    """Runs a lowered graph and keeps every call of our ops."""

    def __init__(self, graph: GraphModule) -> None:
        super().__init__(graph)
        self.ops: dict[object, Op] = {op.overload: op for op in BY_TYPE.values()}
        self.found: list[Call] = []

    def run_node(self, n: FxNode) -> Any:
        if n.op == "call_function" and (op := self.ops.get(n.target)) is not None:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            bound = op.signature.bind(*args, **kwargs)
            bound.apply_defaults()
            weights = [str(source.target) for source in n.all_input_nodes if source.op == "get_attr"]
            self.found.append(Call(" ".join((n.name, *weights[:1])), op, bound.arguments))
        return super().run_node(n)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Of the family that has biases."""
    return open_checkpoint(write_folder(tmp_path_factory.mktemp("lowered") / "model", "dream", **SIZES))


@pytest.fixture(scope="module")
def lowered(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Case]:
    """`lowered(method, bits, *sets)`, made once."""

    @cache
    @torch.no_grad()
    def made(method: str, bits: Bits, *sets: str) -> Case:
        recipe, states = quick_recipe(method, bits, *sets), random_states(checkpoint)
        folder = tmp_path_factory.mktemp("weights") / "weights"
        write_weights(checkpoint, recipe, folder, states=states, on_piece=lambda _: None)
        weights = Weights(folder)
        graph = Calls(materialise(lowered_graph(checkpoint.config, recipe, weights.numbers), weights.all()))
        ids, positions, kv_len, rows, bias, inv_temp = feeds_of(checkpoint, states)
        kept = slice(BATCH), slice(QUERY)
        graph.run(ids[kept], positions[kept], kv_len[:BATCH].clamp(max=QUERY), rows[kept], bias, inv_temp[:BATCH])
        return Case(recipe, weights, graph.found)

    return made


def as_plugin_node(call: Call) -> Node:
    """The node of the TensorRT profile."""
    given = {n: v.contiguous() if isinstance(v, Tensor) else v for n, v in call.arguments.items()}
    if call.op.name == "rotate":
        return node(call.op.name, given, y_type=given["x"].dtype)
    if call.op.name.endswith("linear"):
        return node(call.op.name, given, y_type=torch.float16 if given["residual"] is None else given["residual"].dtype)
    return node(call.op.name, given)


def refusal(harness: Harness, call: Call, folder: Path) -> str | None:
    """Null, or why the plugin does not take the call or gives something else than its reference."""
    given = as_plugin_node(call)
    answer, outputs = harness.live(given.plugin, given.attributes, given.inputs, folder)
    if "failed" in answer:
        return f"{answer['failed']}: {harness.reasons}"
    for name, array, taken in zip(call.inputs, given.inputs, answer["formats"], strict=False):
        wanted = EITHER_FLOAT if name in ("x", "residual") else [DATA_TYPES[array.dtype]]
        if taken != wanted:
            return f"{name}: the plugin takes types {taken}, expected {wanted}"
    found, expected = ([torch.from_numpy(array) for array in arrays] for arrays in (outputs, given.expected))
    inputs = dict(zip(call.inputs, map(torch.from_numpy, given.inputs), strict=True))
    named: dict[str, Any] = {name: value for name, value in given.attributes.items() if not name.startswith("has_")}
    op = "linear" if call.op.name.endswith("linear") else call.op.name
    if op == "quantize":
        named |= {name: tensor for name, tensor in inputs.items() if name != "x"}
        none = [torch.empty(0, dtype=torch.int32)] * (3 - len(found))
        found, expected = [*found, *none], [*expected, *none]
    return compare_call(op, found, expected, tuple(inputs.values()), named)


def refusals(harness: Harness, calls: list[Call], folder: Path) -> dict[str, str]:
    """Reasons by the names of the nodes that have one."""
    reasons = ((f"{call.op.onnx_type} {call.name}", refusal(harness, call, folder)) for call in calls)
    return {name: reason for name, reason in reasons if reason}


def cases() -> list[tuple[str, Bits, tuple[str, ...]]]:
    """Every method at every format on the grid of its recipe and on the finest; plain rounding in every other form."""
    several: list[tuple[str, tuple[str, ...]]] = [(name, grid) for name in INTEGER_METHODS for grid in ((), FINE)]
    several += [("rtn", ZEROS), ("rtn", GROUPS), ("rtn", ("lowering.debug_logits=true",))]
    several += [("rtn", (group, *more)) for group in GROUPS for more in ((), ZEROS)]
    return [(name, bits, grid) for name, grid in several for bits in sorted(METHODS[name].formats & INTEGER)]


@pytest.mark.parametrize(("method", "bits", "grid"), cases(), ids=str)
def test_plugins_take_every_node(
    lowered: Callable[..., Case], harness: Harness, tmp_path: Path, method: str, bits: Bits, grid: tuple[str, ...]
) -> None:
    case = lowered(method, bits, *grid)
    assert len(case.calls) >= 10
    assert refusals(harness, case.calls, tmp_path) == {}


@pytest.mark.parametrize(
    ("setting", "reason", "refused"),
    [
        ("linear.w_group=64", "w_group: got 64, expected 0 or a multiple of 128", ["DllmcInt4Linear"]),
        ("linear.a_group=64", "a_group: got 64, expected 0 or a multiple of 128", ["DllmcInt4Linear", "DllmcQuantize"]),
        ("lowering.top_k=65", "top_k: got 65, expected 1 to 64", ["DllmcHead"]),
    ],
)
def test_what_only_the_function_bodies_do_is_refused(
    lowered: Callable[..., Case], harness: Harness, tmp_path: Path, setting: str, reason: str, refused: list[str]
) -> None:
    """A recipe may ask for more than the kernels take: ONNX Runtime does it, no engine is built."""
    calls = lowered("rtn", (4, 4), setting).calls
    found = refusals(harness, calls, tmp_path)
    assert sorted({name.split()[0] for name in found}) == refused
    assert all(reason in why for why in found.values()), found


def sizes_of(value: ir.Value) -> list[int]:
    """Sizes in the file, those that vary as this module's runs have them."""
    assert value.shape is not None
    varying = {"batch": BATCH, "query": QUERY, "rows": QUERY}
    return [size if isinstance(size, int) else varying[str(size)] for size in value.shape]


@pytest.mark.parametrize("method", INTEGER_METHODS)
def test_the_file_has_the_same_nodes(
    checkpoint: Checkpoint, lowered: Callable[..., Case], tmp_path: Path, method: str
) -> None:
    """Attributes, inputs, their types and sizes are those of the calls that the plugins were asked about."""
    case = lowered(method, [(4, 4), (8, 8)][INTEGER_METHODS.index(method) % 2])
    path = tmp_path / "model.onnx"
    write_onnx(checkpoint.config, case.recipe, case.weights, path, on_weight=lambda _: None)
    nodes = [node for node in ir.load(path).graph if node.domain == DOMAIN]
    for found, call in zip(nodes, case.calls, strict=True):
        assert BY_TYPE[found.op_type] is call.op, found.name
        numbers = {name: attribute.value for name, attribute in found.attributes.items()}
        assert numbers == {**call.op.attributes(call.arguments), **PLUGIN}, found.name
        for value, (name, tensor) in zip(found.inputs, call.inputs.items(), strict=True):
            assert value is not None
            assert value.dtype is not None
            assert (FILE_TYPES[value.dtype], sizes_of(value)) == (tensor.dtype, list(tensor.shape)), (found.name, name)
