"""Put weights on their grids one after another, each changed first to make up for what was lost before it.

The inputs are those of the quantised blocks and linears before, on their own grids; the aim is the float result: what
the float linear gives, or, where the residual stream takes it up, what brings the present stream to the float one.
`solvers/paired.py` has the formula. Shape letters: M rows that count, N outputs, K inner.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from passes.base import Pass
from passes.fit import Batch, CalibrationError, Fit, check_learnable
from passes.graph import attribute, calls, drop_unused, is_call, node_of, site_of
from passes.hessians import add_products, mirror, values_graph
from passes.insert_fake_quant import InsertFakeQuant
from passes.insert_tac import attention_outputs
from passes.quant_spec import QuantPlan, QuantSpec
from passes.quantize_attention import QuantizeAttention
from passes.quantize_in_sequence import HessianSolver
from passes.quantize_weights import float_weight, nearest, planned, store_grid
from passes.solvers.gptq import SingularHessianError
from passes.solvers.grid import Grid
from passes.solvers.paired import paired_weight

RIDGE = 1e-2  # share of the mean diagonal that holds a weight to what it was

aten = torch.ops.aten


class QuantizePaired:
    """Every linear that the plan names, in order of execution; on shapes alone grids have the right shapes.

    Activations, attention's too where the plan has it, are put on their grids first, where they are not yet. `correct`
    are run before the first linear that reads attention's transformed output. Raises CalibrationError, with the site's
    name, for inputs or float outputs that nothing can be solved by.
    """

    def __init__(self, plan: QuantPlan, fit: Fit, solve: HessianSolver, correct: Sequence[Pass] = ()) -> None:
        self.plan, self.fit, self.solve, self.correct = plan, fit, solve, correct

    def __call__(self, graph: GraphModule) -> int:
        InsertFakeQuant(self.plan, self.fit.numbers)(graph)
        QuantizeAttention(self.plan)(graph)
        count, pending = 0, self.correct
        for linear, site, spec in planned(graph, self.plan):
            if pending and site in attention_outputs(graph):
                # Not later: a weight solved on what is still wrong would make up for it a second time.
                for each in pending:
                    each(graph)
                pending = ()
            weight = float_weight(graph, linear)
            grid = nearest(site, weight, spec) if weight.is_meta else self._solved(graph, linear, spec)
            store_grid(graph, linear, grid, spec)
            drop_unused(graph)  # the float weight goes before the next one is copied
            count += 1
        return count

    def _solved(self, graph: GraphModule, linear: Node, spec: QuantSpec) -> Grid:
        weight, site = float_weight(graph, linear), site_of(linear)
        moments, outputs = paired_sums(graph, linear, self.fit)
        weight = paired_weight(weight, moments, outputs, RIDGE)
        del outputs
        hessian = moments.float()
        del moments
        try:
            return self.solve(weight, hessian, spec)
        except SingularHessianError as error:
            raise CalibrationError(f"inputs of {site} leave nothing to solve by: {error}") from error


@torch.no_grad()
def paired_sums(graph: GraphModule, linear: Node, fit: Fit) -> tuple[Tensor, Tensor]:
    """X^T X [K, K] and Y^T X [N, K] in float64 over the valid rows; a bias of the linear is taken off Y.

    Raises what `check_learnable` does for X, CalibrationError for a Y that is not finite, ValueError for a fit without
    both streams and the float block.
    """
    site, weight = site_of(linear), float_weight(graph, linear)
    if fit.samples is None or fit.quantized is None or fit.reference is None:
        raise ValueError(f"{site} cannot be solved without its float block, and inputs of both")
    other = _taken_up_by(linear)
    present = values_graph(graph, node_of(linear.args[0]), *(() if other is None else (other,)))
    wanted = values_graph(fit.reference, _result(_twin(fit.reference, site)))

    def inputs(batch: Batch) -> tuple[Tensor, Tensor | None]:
        x, stream = present(*batch.inputs) if other is not None else (present(*batch.inputs), None)
        check_learnable(x, batch, f"the quantised input of {site}")
        return x[batch.valid].double(), None if stream is None else stream[batch.valid].double()

    def targets(batch: Batch) -> Tensor:
        y: Tensor = wanted(*batch.inputs)[batch.valid]
        if not bool(y.isfinite().all()):
            last = batch.first + len(batch.valid) - 1
            raise CalibrationError(
                f"the float output of {site} has values that are not finite in calibration samples {batch.first} to "
                f"{last}; nothing can be learned from it: check the weights of the model"
            )
        return y.double()

    moments = torch.zeros(weight.shape[1], weight.shape[1], dtype=torch.float64)
    outputs = torch.zeros(weight.shape, dtype=torch.float64)
    bias = _bias(graph, linear)
    for (x, stream), y in zip(fit.quantized.map(inputs), fit.samples.map(targets), strict=True):
        for less in (stream, bias):
            y = y if less is None else y - less
        add_products(moments, x)
        outputs.addmm_(y.T, x)
    mirror(moments)
    return moments, outputs


def _taken_up_by(linear: Node) -> Node | None:
    """The stream that `linear` is added to; None where something else reads it."""
    (reader, *others) = linear.users
    if others or not is_call(reader, aten.add.Tensor):
        return None
    first, second = reader.args
    return node_of(second if first is linear else first)


def _result(linear: Node) -> Node:
    """The sum that takes up `linear`, or the linear itself."""
    return linear if _taken_up_by(linear) is None else next(iter(linear.users))


def _twin(reference: GraphModule, site: str) -> Node:
    return next(linear for linear in calls(reference, aten.linear.default) if site_of(linear) == site)


def _bias(graph: GraphModule, linear: Node) -> Tensor | None:
    found = linear.args[2] if len(linear.args) > 2 else None
    return None if found is None else attribute(graph, node_of(found)).double()
