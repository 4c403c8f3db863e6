"""Second moments of what a linear reads, sum of x x^T: half the Hessian of its squared output error.

Shape letters: B batch, Q query rows, K inner, M rows that count.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from passes.fit import Batch, CalibrationError, Samples, check_learnable
from passes.graph import attribute, node_of, site_of

STRIP = 1024  # rows of the matrix that are multiplied at once

# How much each row of a batch counts, [B, Q], none below 0.
Weigh = Callable[[Batch], Tensor]


def hessian(graph: GraphModule, linear: Node, samples: Samples, weigh: Weigh | None = None) -> Tensor:
    """Float32 [K, K] over the valid rows of all samples, of the input as the graph computes it now.

    Raises CalibrationError for an input that is not finite or has one value in all of a sample, and for squares that
    leave the range of float32.
    """
    site, part = site_of(linear), input_graph(graph, linear)

    def rows(batch: Batch) -> Tensor:
        x: Tensor = part(*batch.inputs)
        return _rows_that_count(x, batch, site, weigh)

    inner = attribute(graph, node_of(linear.args[1])).shape[1]
    total = torch.zeros(inner, inner)
    # Workers hand over rows and not their products, of which there shall be one, whatever their number.
    for part_rows in samples.map(rows):
        add_products(total, part_rows)
    mirror(total)
    if not bool((total.diagonal() > 0).any()):
        raise CalibrationError(f"inputs of {site} are too small: their squares, as they weigh, are zero in float32")
    if not bool(total.diagonal().isfinite().all()):
        raise CalibrationError(f"inputs of {site} are too large: their squares leave the range of float32")
    return total


def add_products(total: Tensor, rows: Tensor) -> None:
    """Add sum of x^T x of rows [M, K] to `total` [K, K], the diagonal and what is above."""
    # From the diagonal on: at the width of a down projection these products take longer than all the rest.
    for start in range(0, len(total), STRIP):
        strip = slice(start, start + STRIP)
        total[strip, start:].addmm_(rows[:, strip].T, rows[:, start:])


def mirror(total: Tensor) -> None:
    """Fill what is below the diagonal of `total` [K, K]."""
    for start in range(0, len(total), STRIP):
        strip, rest = slice(start, start + STRIP), slice(start + STRIP, None)
        total[rest, strip] = total[strip, rest].T


def _rows_that_count(x: Tensor, batch: Batch, site: str, weigh: Weigh | None) -> Tensor:
    check_learnable(x, batch, f"the input of {site}")
    rows = x[batch.valid].float()
    return rows if weigh is None else rows * weigh(batch)[batch.valid].sqrt()[:, None]


def input_graph(graph: GraphModule, linear: Node) -> GraphModule:
    """What computes the input of `linear` from the inputs of the graph, and nothing else; weights are shared."""
    return values_graph(graph, node_of(linear.args[0]))


def values_graph(graph: GraphModule, *values: Node) -> GraphModule:
    """The same for any `values`; several come as a tuple."""
    needed, found = set(values), list(values)
    while found:
        new = [node for node in found.pop().all_input_nodes if node not in needed]
        needed.update(new)
        found.extend(new)
    made, copies = Graph(), dict[Node, Node]()
    for node in graph.graph.nodes:
        if node in needed or node.op == "placeholder":
            copies[node] = made.node_copy(node, copies.__getitem__)
    made.output(copies[values[0]] if len(values) == 1 else tuple(copies[value] for value in values))
    return GraphModule(graph, made)
