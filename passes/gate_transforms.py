"""Let each mask state keep coordinates of its own in transformed inputs: the other state's are zeroed.

    prepare(x, left, right)  ->  prepare(x, left, right, state, gate_axis, gate_size)

One static weight serves both states (FreeAct, arXiv 2603.01776; the mask states of arXiv 2606.04945, section 3.2). Not
exact, so it is part of quantisation; how far off it is depends on what little the zeroed coordinates hold.
Shape letters: K inner, a x b = K the Kronecker factors.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from passes.fit import CalibrationError
from passes.graph import attribute, calls, node_of
from passes.solvers.kronecker import factor_pairs
from plugins.prepare import PREPARE

aten, ops = torch.ops.aten, torch.ops.dllmc


@dataclass(frozen=True)
class Gate:
    """Slices of a tile [a, b] along `axis` that one mask state has for itself: masked, then unmasked, stand last."""

    axis: int
    size: int


def gate_of(factors: tuple[int, int], share: int, option: str = "freeact.share") -> Gate:
    """The fewest coordinates in whole slices that are no fewer than K / `share`; on a tie, slices along axis 0.

    Raises CalibrationError, naming the `option` that holds the share, where two such gates leave no shared slice.
    """
    fitting = []
    for axis, length in enumerate(factors):
        across = factors[1 - axis]
        size = -(-length // share)  # size x across >= length x across / share
        if 2 * size < length:
            fitting.append((size * across, axis, size))
    if not fitting:
        a, b = factors
        raise CalibrationError(
            f"a tile of {a} x {b} channels has no room for two gates of 1/{share}; try a larger {option}"
        )
    _, axis, size = min(fitting)
    return Gate(axis, size)


def gated_factors(width: int, share: int) -> tuple[int, int]:
    """(a, b) with a x b = width and a <= b: the closest pair whose gate has `width` / `share` coordinates, not more.

    The closest pair where none has. 4096 = 64 x 64, 3584 = 56 x 64, 384 = 12 x 32, 128 = 4 x 32 for a share of 32.
    """
    pairs = factor_pairs(width)
    exact = (pair for pair in pairs if any(size % share == 0 and size > 2 * (size // share) for size in pair))
    return next(exact, pairs[0])


def gate_masks(factors: tuple[int, int], gate: Gate) -> Tensor:
    """What each state keeps of a tile: ones and zeros [2, a, b], unmasked first."""
    masks = torch.ones(2, *factors)
    length = factors[gate.axis]
    masks[0].narrow(gate.axis, length - 2 * gate.size, gate.size).zero_()
    masks[1].narrow(gate.axis, length - gate.size, gate.size).zero_()
    return masks


class GateTransforms:
    """Every transformed input; in a block `state` is an input, in a whole graph it is `input_ids == mask_id`."""

    def __init__(self, share: int, mask_id: int) -> None:
        self.share, self.mask_id = share, mask_id

    def __call__(self, graph: GraphModule) -> int:
        prepared = {node: PREPARE.arguments(*node.args) for node in calls(graph, ops.prepare.default)}
        transforms = {node: given for node, given in prepared.items() if given["left"] is not None}
        if not transforms:
            return 0
        state = state_node(graph, self.mask_id)
        for node, given in transforms.items():
            left, right = (attribute(graph, node_of(given[side])).shape[0] for side in ("left", "right"))
            gate = gate_of((left, right), self.share)
            given |= {"state": state, "gate_axis": gate.axis, "gate_size": gate.size}
            node.args = tuple(given.values())
        return len(transforms)


def state_node(graph: GraphModule, mask_id: int) -> Node:
    """The node that is 1 at masked positions, int32 [B, Q]; made of the ids where it is no input."""
    inputs: dict[str, Node] = {node.name: node for node in graph.graph.find_nodes(op="placeholder")}
    if "state" in inputs:
        return inputs["state"]
    if "input_ids" not in inputs:
        raise ValueError(f"no mask state can be told from inputs {', '.join(inputs)}")
    last = list(inputs.values())[-1]
    with graph.graph.inserting_after(last):
        masked = graph.graph.call_function(aten.eq.Scalar, (inputs["input_ids"], mask_id))
    with graph.graph.inserting_after(masked):
        return graph.graph.call_function(aten.to.dtype, (masked, torch.int32))
