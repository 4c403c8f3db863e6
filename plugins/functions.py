"""Gives every `dllmc` node of a model its meaning in standard ops, so that stock ONNX Runtime runs the file.

One local function per op and variant of attributes; the variant is the function's `overload`, which ONNX Runtime
resolves (`onnx.reference` does not: inline first). Nodes whose whole meaning is standard are replaced in place.
"""

from collections.abc import Mapping

import onnx_ir as ir

from plugins.body import INT4, Body
from plugins.int4 import code_range
from plugins.op import DOMAIN, PLUGIN, VERSION, Attributes, Op


def _sort_attributes(op: Op, node: ir.Node) -> dict[str, int | float]:
    """Numbers of the node in the order its op declares them; the exporter leaves that of an unordered map."""
    names = op.attribute_names
    if set(node.attributes) != {*names, *PLUGIN}:
        raise ValueError(f"{node.name} has attributes {sorted(node.attributes)}, expected {sorted((*names, *PLUGIN))}")
    ordered = [node.attributes[name] for name in (*names, *PLUGIN)]
    node.attributes.clear()
    node.attributes.update({attr.name: attr for attr in ordered})
    return {name: node.attributes[name].value for name in names}


def _packed(tensor: ir.TensorProtocol, name: str | None) -> ir.LazyTensor:
    """INT4 view of int8 codes, converted when the model is saved."""

    def convert() -> ir.TensorProtocol:
        array = tensor.numpy()
        low, high = code_range(4, symmetric=False)
        if array.size and (array.min() < low or array.max() > high):
            found = f"{array.min()}..{array.max()}"
            raise ValueError(f"codes of {name} do not fit 4 bits; got {found}, expected {low}..{high}")
        return ir.Tensor(array.astype(INT4.numpy()), name=name)

    return ir.LazyTensor(convert, dtype=INT4, shape=ir.Shape(tensor.shape.numpy()), name=name)


def _narrow(value: ir.Value) -> None:
    """Declare codes INT4 where they are made: outputs of our nodes and initialisers."""
    if value.is_initializer():
        if value.const_value is not None and value.const_value.dtype != INT4:
            value.const_value = _packed(value.const_value, value.name)
    elif (producer := value.producer()) is None or producer.domain != DOMAIN:
        return
    value.dtype = INT4


def _narrow_codes(op: Op, node: ir.Node, attributes: Attributes) -> None:
    names = (*op.present(attributes), *op.outputs(attributes))
    for name, value in zip(names, (*node.inputs, *node.outputs), strict=True):
        if name in op.narrow(attributes):
            assert value is not None
            _narrow(value)


def _write(op: Op, attributes: Attributes, inputs: list[ir.Value], prefix: str) -> tuple[Body, list[ir.Value]]:
    assert op.body is not None
    body = Body(prefix)
    return body, list(op.body(body, dict(zip(op.present(attributes), inputs, strict=True)), attributes))


def _function(op: Op, node: ir.Node, attributes: Attributes, opset: int) -> ir.Function:
    inputs = [ir.Value(name=name) for name in op.present(attributes)]
    body, outputs = _write(op, attributes, inputs, prefix="")
    for name, value in zip(op.outputs(attributes), outputs, strict=True):
        value.name = name
    graph = ir.Graph(inputs, outputs, nodes=body.nodes, opset_imports={"": opset})
    # ORT rejects attributes of a call that its function does not declare.
    declared = [ir.Attr(attr.name, attr.type, None) for attr in node.attributes.values()]
    return ir.Function(DOMAIN, node.op_type, node.overload, graph=graph, attributes=declared)


def _inline(op: Op, node: ir.Node, attributes: Attributes) -> None:
    body, outputs = _write(op, attributes, [value for value in node.inputs if value], prefix=f"{node.name}/")
    graph = node.graph
    assert graph is not None
    for new, old in zip(outputs, node.outputs, strict=True):
        new.name, new.type, new.shape = old.name, old.type, old.shape
    metadata = dict(node.metadata_props)
    for made in body.nodes:
        made.metadata_props.update(metadata)
    ir.convenience.replace_nodes_and_values(graph, node, [node], body.nodes, node.outputs, outputs)


def attach_functions(model: ir.Model, ops: Mapping[str, Op]) -> int:
    """Write names of variants, INT4 types and one function per variant; returns how many `dllmc` nodes were met.

    Raises ValueError for a node of the domain that no op declares.
    """
    by_type = {op.onnx_type: op for op in ops.values() if op.onnx_type}
    opset = model.opset_imports[""]
    nodes = [node for node in model.graph.all_nodes() if node.domain == DOMAIN]
    for node in nodes:
        if node.op_type not in by_type:
            raise ValueError(f"unknown op; got {DOMAIN}.{node.op_type}, expected one of {', '.join(map(str, by_type))}")
        op = by_type[node.op_type]
        attributes = _sort_attributes(op, node)
        _narrow_codes(op, node, attributes)
        if op.inlined:
            _inline(op, node, attributes)
            continue
        node.overload = op.variant(attributes)
        if node.op_identifier() not in model.functions:
            function = _function(op, node, attributes, opset)
            model.functions[function.identifier()] = function
    if nodes:
        model.opset_imports[DOMAIN] = VERSION
    return len(nodes)
