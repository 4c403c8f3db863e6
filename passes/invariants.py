"""What must hold of a graph at each point of the road; every check names the node that breaks it."""

import torch
from torch.fx import GraphModule, Node

from passes.graph import attribute, attribute_name, attributes, calls, int_of, is_attribute, is_call, node_of, site_of
from plugins.int4 import code_range


def check_float(graph: GraphModule) -> None:
    """Every weight is floating point and every linear reads its weight directly."""
    for name, value in attributes(graph).items():
        if not value.is_floating_point():
            raise ValueError(f"weight {name} is {value.dtype}, expected floating point")
    for node in calls(graph, torch.ops.aten.linear.default):
        if not is_attribute(node.args[1]):
            raise ValueError(f"{node.name} does not read a weight")


def check_rewritten(graph: GraphModule) -> None:
    """Every linear still reads a float weight directly, whatever stands before it."""
    for node in calls(graph, torch.ops.aten.linear.default):
        if not is_attribute(node.args[1]) or not attribute(graph, node_of(node.args[1])).is_floating_point():
            raise ValueError(f"{node.name} does not read a float weight")


def check_quantized(graph: GraphModule) -> None:
    """No linear computes with quantised activations and a float weight, and codes lie on their grid."""
    ops = torch.ops.dllmc
    for node in calls(graph, torch.ops.aten.linear.default):
        quantised_input = is_call(node.args[0], ops.fake_quant.default)
        quantised_weight = is_call(node.args[1], ops.dequantize.default)
        if quantised_input and not quantised_weight:
            raise ValueError(f"{site_of(node)} has quantised activations and a float weight")
        if quantised_input and len(node_of(node.args[1]).args) > 4:
            raise ValueError(f"{site_of(node)} has quantised activations and a weight with a zero point")
    for node in calls(graph, ops.dequantize.default):
        codes, scale, bits, _, *zero = node.args
        if not all(is_attribute(each) for each in (codes, scale, *zero)):
            raise ValueError(f"{node.name} does not read stored codes and scales")
        for each in (codes, *zero):
            _check_codes(graph, node_of(each), *code_range(int_of(bits), symmetric=not zero))


def _check_codes(graph: GraphModule, stored: Node, low: int, high: int) -> None:
    name, table = attribute_name(stored), attribute(graph, stored)
    if table.dtype != torch.int8:
        raise ValueError(f"codes {name} are {table.dtype}, expected int8")
    if not table.is_meta and (int(table.amin()) < low or int(table.amax()) > high):
        raise ValueError(f"codes {name} span {int(table.amin())}..{int(table.amax())}, expected {low}..{high}")


def check_lowered(graph: GraphModule) -> None:
    """Nothing is left that only simulates: no fake-quantised activation, no linear on one."""
    for node in calls(graph, torch.ops.dllmc.fake_quant.default):
        raise ValueError(f"{node.name} still simulates quantisation")
