"""A torch module with every op, exported with dynamic sizes, runs in stock ONNX Runtime and equals torch."""

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from plugins import attach_functions, translation_table
from plugins.body import INT4, INT8
from plugins.op import DOMAIN, PLUGIN

ops = torch.ops.dllmc
D, N, V = 64, 96, 50


def frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


class Net(nn.Module):
    """A gated MLP at 4 and 8 bits, a rotation and both kinds of head."""

    def __init__(self) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(0)

        def codes(limit: int, *shape: int) -> nn.Parameter:
            return frozen(torch.randint(-limit, limit + 1, shape, dtype=torch.int8, generator=rng))

        def scales(*shape: int) -> nn.Parameter:
            return frozen(torch.rand(*shape, generator=rng) * 0.01)

        self.norm = frozen(1 + scales(D))
        self.up, self.up_scale = codes(7, N, D), scales(N, 1)
        self.down, self.down_scale = codes(127, D, N // 2), scales(D, 1)
        self.down_sum = frozen(self.down.sum(1, keepdim=True, dtype=torch.int32))
        self.grouped, self.grouped_scale = codes(7, D, D), scales(D, 4)
        self.table, self.table_scale = codes(7, D, D), scales(D, 4)
        self.blocks, self.perm = frozen(torch.randn(4, 16, 16, generator=rng)), frozen(torch.randperm(D, generator=rng))
        self.head, self.head_scale = codes(127, V, D), scales(V, 1)

    def forward(self, x: Tensor, logit_bias: Tensor, inv_temp: Tensor) -> tuple[Tensor, ...]:
        codes, scale, _ = ops.quantize(x, self.norm, bits=4)
        y = ops.int4_linear(codes, scale, None, self.up, self.up_scale, swiglu=True)
        codes, scale, zero = ops.quantize(y, bits=8, symmetric=False)
        y = ops.int8_linear(codes, scale, zero, self.down, self.down_scale, self.down_sum, residual=x)
        codes, scale, _ = ops.quantize(y, bits=4, a_group=16)
        y = ops.int4_linear(codes, scale, None, self.grouped, self.grouped_scale, a_group=16, w_group=16)
        y = ops.rotate(y, self.blocks, self.perm)
        table = ops.dequantize(self.table, self.table_scale, 4, 16)
        codes, scale, _ = ops.quantize(y, self.norm, bits=8)
        integer = ops.head(codes, scale, self.head, self.head_scale, logit_bias, inv_temp, 4)
        return (y, table, *integer, *ops.record(y, self.norm, inv_temp, 4))


def export(net: nn.Module, device: str = "cpu") -> ir.Model:
    batch, rows = torch.export.Dim("batch"), torch.export.Dim("rows")
    example = tuple(torch.ones(shape, device=device) for shape in ((2, 5, D), (V,), (2,)))
    with warnings.catch_warnings():
        # Both are the exporter's own: it reads a deprecated class, and notes that two inputs share the batch.
        warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*", category=FutureWarning)
        warnings.filterwarnings("ignore", message=".*axis name: batch will not be used.*", category=UserWarning)
        program = torch.onnx.export(
            net.eval(),
            example,
            dynamo=True,
            optimize=False,
            opset_version=24,
            custom_translation_table=translation_table(),
            dynamic_shapes=({0: batch, 1: rows}, None, {0: batch}),
            verbose=False,
        )
    assert program is not None
    return program.model


@pytest.fixture(scope="module")
def model() -> ir.Model:
    found = export(Net())
    assert attach_functions(found) == 11
    return found


def test_file_runs_in_stock_onnxruntime(model: ir.Model, checked_file: Callable[[ir.Model], Path]) -> None:
    path = checked_file(model)
    assert model.opset_imports == {"": 24, DOMAIN: 1}
    net = Net().eval()
    rng = torch.Generator().manual_seed(1)
    for disabled in ([], ["ConstantFolding"]):
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"], disabled_optimizers=disabled)
        names = [value.name for value in session.get_inputs()]
        for batch, rows in ((1, 1), (2, 5), (3, 37)):
            x = torch.randn(batch, rows, D, generator=rng) * 3
            feeds = (x, torch.randn(V, generator=rng), torch.rand(batch, generator=rng) + 0.5)
            expected = net(*feeds)
            found = session.run(None, {name: feed.numpy() for name, feed in zip(names, feeds, strict=True)})
            for index, (a, b) in enumerate(zip(found, expected, strict=True)):
                # Integers flow from end to end; float64 sums rounded to float32 leave at most the neighbouring value.
                assert a.dtype == b.numpy().dtype and a.shape == b.shape
                assert (np.abs(a - b.numpy()) <= np.abs(a) * 2.0**-22).all(), index


def test_nodes_carry_all_their_attributes(model: ir.Model) -> None:
    nodes = [node for node in model.graph if node.domain == DOMAIN]
    assert [node.op_type for node in nodes] == [
        *["DllmcQuantize", "DllmcInt4Linear", "DllmcQuantize", "DllmcInt8Linear", "DllmcQuantize"],
        *["DllmcInt4Linear", "DllmcRotate", "DllmcQuantize", "DllmcHead"],
    ]
    for node in nodes:
        assert {name: node.attributes[name].value for name in PLUGIN} == PLUGIN
        assert all(value is not None for value in node.inputs)
        assert node.op_identifier() in model.functions
    linear = nodes[3].attributes
    assert (linear["has_zero"].value, linear["has_bias"].value, linear["has_residual"].value) == (1, 0, 1)


def test_codes_of_four_bits_are_typed_so(model: ir.Model) -> None:
    types = {name: value.dtype for name, value in model.graph.initializers.items()}
    assert (types["up"], types["grouped"], types["table"]) == (INT4, INT4, INT4)
    assert (types["down"], types["head"]) == (INT8, INT8)
    codes = [node.outputs[0].dtype for node in model.graph if node.op_type == "DllmcQuantize"]
    assert codes == [INT4, INT8, INT4, INT8]


def test_ops_with_a_standard_meaning_are_written_out(model: ir.Model) -> None:
    types = {node.op_type for node in model.graph if node.domain == ""}
    assert {"DequantizeLinear", "TopK"} <= types
    names = [node.name for node in model.graph]
    assert len(set(names)) == len(names)


def test_a_second_call_changes_nothing(model: ir.Model) -> None:
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    assert attach_functions(model) == 9
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_weights_may_be_absent() -> None:
    """The whole model is exported on the meta device; types must come out right without data."""
    found = export(Net().to("meta"), device="meta")
    for name in ("up", "grouped"):
        found.graph.initializers[name].const_value = None
    assert attach_functions(found) == 11
    types = [found.graph.initializers[name].dtype for name in ("up", "grouped", "table", "down")]
    assert types == [INT4, INT4, INT4, INT8]


def test_weights_that_do_not_fit_are_refused() -> None:
    net = Net()
    net.up.data[0, 0] = 9
    found = export(net)
    attach_functions(found)
    with pytest.raises(ValueError, match="codes of up do not fit 4 bits"):
        found.graph.initializers["up"].const_value.numpy()


def test_unknown_ops_and_attributes_are_refused() -> None:
    def lone(op_type: str) -> ir.Model:
        node = ir.Node(DOMAIN, op_type, [], name="odd")
        graph = ir.Graph([], node.outputs, nodes=[node], opset_imports={"": 24})
        return ir.Model(graph, ir_version=11)

    with pytest.raises(ValueError, match=r"unknown op; got dllmc\.DllmcSoftmax"):
        attach_functions(lone("DllmcSoftmax"))
    with pytest.raises(ValueError, match="odd has attributes"):
        attach_functions(lone("DllmcHead"))


def test_order_of_attributes_does_not_reach_the_file() -> None:
    """The exporter takes attributes from an unordered map, whose order is nobody's promise."""
    exported = ir.to_proto(export(Net()))
    files = []
    for reverse in (False, True):
        found = ir.from_proto(exported)
        for node in found.graph:
            attributes = sorted(node.attributes.values(), key=lambda attr: attr.name, reverse=reverse)
            node.attributes.clear()
            node.attributes.update({attr.name: attr for attr in attributes if attr is not None})
        attach_functions(found)
        files.append([proto.SerializeToString() for proto in map(ir.to_proto, found.graph)])
    assert files[0] == files[1]
