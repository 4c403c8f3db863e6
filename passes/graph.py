"""The few questions every pass asks of a captured graph, and the few edits it makes."""

import operator
from collections.abc import Iterator, Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

import plugins  # noqa: F401  importing it defines torch.ops.dllmc


def calls(graph: GraphModule, op: object) -> Iterator[Node]:
    """Every call of `op`, in graph order; safe against edits while iterating."""
    return (node for node in list(graph.graph.nodes) if node.op == "call_function" and node.target is op)


def is_call(value: object, op: object) -> bool:
    """True when `value` is a node that calls `op`."""
    return isinstance(value, Node) and value.op == "call_function" and value.target is op


def is_attribute(value: object) -> bool:
    """True when `value` reads a weight or buffer of the graph."""
    return isinstance(value, Node) and value.op == "get_attr"


def node_of(value: object) -> Node:
    """`value` as the node it must be."""
    if not isinstance(value, Node):
        raise TypeError(f"expected a node, found {value!r}")
    return value


def int_of(value: object) -> int:
    """`value` as the integer argument it must be."""
    if not isinstance(value, int):
        raise TypeError(f"expected an integer, found {value!r}")
    return value


def attribute_name(node: Node) -> str:
    """Dotted name of the weight or buffer that `node` reads."""
    assert node.op == "get_attr", node
    return str(node.target)


def attribute(graph: GraphModule, node: Node) -> Tensor:
    """The weight or buffer that `node` reads."""
    value: object = graph
    for part in attribute_name(node).split("."):
        value = getattr(value, part)
    return cast(Tensor, value)


def attributes(graph: GraphModule) -> dict[str, Tensor]:
    """Every weight and buffer that the graph reads, by dotted name."""
    return {attribute_name(node): attribute(graph, node) for node in graph.graph.nodes if node.op == "get_attr"}


def add_attribute(graph: GraphModule, name: str, value: Tensor) -> Node:
    """Store `value` under a new dotted name and return a node, at the insertion point, that reads it."""
    *path, leaf = name.split(".")
    owner: nn.Module = graph
    for part in path:
        if not hasattr(owner, part):
            owner.add_module(part, nn.Module())
        owner = getattr(owner, part)
    if hasattr(owner, leaf):
        raise ValueError(f"the graph already has a weight {name!r}")
    owner.register_buffer(leaf, value.detach())
    return graph.graph.get_attr(name)


def set_attributes(graph: GraphModule, values: Mapping[str, Tensor]) -> None:
    """Replace the graph's weights by `values`, by name. Raises ValueError for a missing one or another shape."""
    names = list(attributes(graph))
    if missing := sorted(set(names) - set(values)):
        raise ValueError(f"weights are missing: {', '.join(missing)}")
    update_attributes(graph, {name: values[name] for name in names})


def update_attributes(graph: GraphModule, values: Mapping[str, Tensor]) -> None:
    """Replace those weights that `values` names. Raises ValueError for one the graph does not read or another shape."""
    shapes = {name: value.shape for name, value in attributes(graph).items()}
    if unknown := sorted(set(values) - set(shapes)):
        raise ValueError(f"the graph reads no weights {', '.join(unknown)}")
    for name, value in values.items():
        if value.shape != shapes[name]:
            raise ValueError(f"weight {name} has shape {tuple(value.shape)}, the graph expects {tuple(shapes[name])}")
        *path, leaf = name.split(".")
        owner: nn.Module = graph
        for part in path:
            owner = getattr(owner, part)
        delattr(owner, leaf)
        owner.register_buffer(leaf, value.detach())


def copied_nodes(graph: GraphModule) -> Graph:
    """The same nodes once more; they read weights by the same names."""
    nodes = Graph()
    nodes.output(nodes.graph_copy(graph.graph, {}))
    nodes.set_codegen(graph.graph._codegen)
    return nodes


def twin_of(graph: GraphModule) -> GraphModule:
    """A copy that shares the weights until one of the two replaces its own."""
    return GraphModule(graph, copied_nodes(graph))


def drop_weights(graph: GraphModule) -> None:
    """Free every weight now: a graph is a cycle of references, which the garbage collector may find late."""
    for module in graph.modules():
        module._parameters.clear()
        module._buffers.clear()


def drop_unused(graph: GraphModule) -> None:
    """Remove dead nodes and every weight that no node reads."""
    graph.graph.eliminate_dead_code()
    used = {attribute_name(node) for node in graph.graph.nodes if node.op == "get_attr"}
    for prefix, module in list(graph.named_modules()):
        for table in (module._parameters, module._buffers):
            for leaf in [leaf for leaf in table if (f"{prefix}.{leaf}" if prefix else leaf) not in used]:
                del table[leaf]


def outputs(graph: GraphModule, call: Node, count: int) -> list[Node]:
    """`getitem` nodes of the `count` results of `call`, at the insertion point."""
    return [graph.graph.call_function(operator.getitem, (call, i)) for i in range(count)]


def site_of(node: Node) -> str:
    """Name of a linear: its weight's dotted name without the last part (`blocks.0.attn.o_proj`)."""
    weight = node_of(node.args[1])
    if is_call(weight, torch.ops.dllmc.dequantize.default):
        weight = node_of(weight.args[0])
    elif weight.op != "get_attr":
        weight = node_of(weight.args[0])  # a weight stored in half and cast where it is read
    return attribute_name(weight).rpartition(".")[0]
