"""Compensate the output of attention for what quantisation made of it, before the output projection's transform.

    prepare(z, left, right, ..)  ->  prepare(z, tac_matrix, tac_bias, left, right, ..)

Learned from the same rows in full precision and quantised, of the first canvases; every fourth canvas is held out, and
where the error on those does not fall the identity stays (arXiv 2606.04945, section 3.3 and appendix C).
Shape letters: B batch, Q query rows, M rows, K channels, g channels a block.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from passes.fit import Batch, CalibrationError, Fit
from passes.graph import add_attribute, attribute, calls, is_call, node_of, site_of
from passes.hessians import input_graph
from passes.options import Tac
from passes.quant_spec import QuantPlan
from passes.quantize_attention import quantized_attention
from passes.solvers.tac import Affine, Moments, block_size, chosen, covariance, error, identity, merged, moments
from plugins.prepare import PREPARE

aten, ops = torch.ops.aten, torch.ops.dllmc

ATTENTIONS = (aten.scaled_dot_product_attention.default, quantized_attention)
HELD_OUT, FOURTH = 1, 4  # canvas n is held out where n % FOURTH == HELD_OUT
CHUNK = 1024  # rows that are widened to float64 at a time

# (moments of the fitting rows, of those held out, options) -> the map
FORMS: dict[str, Callable[[Moments, Moments, Tac], Affine]] = {
    "covariance": lambda fitting, _, tac: covariance(fitting, rho=tac.rho, eta=tac.eta, alpha=tac.alpha),
    "paired": lambda fitting, held_out, tac: chosen(fitting, held_out, rho=tac.rho),
}


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Outputs of one attention on the canvases from `first` on: those to fit by and those held out, [M, K]."""

    first: int
    fitting: Tensor
    held_out: Tensor


class InsertTac:
    """Every attention whose output is transformed, with any form but none; needs paired streams where weights are.

    Leaves in `fit.numbers` under `<site>.tac` the share of the held-out squared error that is left, 1 where the
    identity stays. Raises CalibrationError for outputs that are not finite.
    """

    def __init__(self, plan: QuantPlan, fit: Fit) -> None:
        self.tac, self.fit = plan.options.tac, fit

    def __call__(self, graph: GraphModule) -> int:
        if self.tac.form == "none":
            return 0
        prepared = attention_outputs(graph)
        # All are solved first: one site's map changes what the next would read.
        maps = {site: self._map(graph, site, node) for site, node in prepared.items()}
        for site, node in prepared.items():
            given = PREPARE.arguments(*node.args)
            with graph.graph.inserting_before(node):
                given["tac_matrix"] = add_attribute(graph, f"{site}.tac_matrix", maps[site].matrix)
                given["tac_bias"] = add_attribute(graph, f"{site}.tac_bias", maps[site].bias.flatten())
            node.args = tuple(given.values())
        return len(prepared)

    def _map(self, graph: GraphModule, site: str, node: Node) -> Affine:
        given = PREPARE.arguments(*node.args)
        left, right = (attribute(graph, node_of(given[side])) for side in ("left", "right"))
        width = left.shape[0] * right.shape[0]
        block = block_size(width, self.tac.block)
        if left.is_meta:
            with torch.device("meta"):
                return identity(width, block)
        fitting, held_out = self._moments(graph, site, node, block)
        found, share = identity(width, block), 1.0
        if fitting is not None and held_out is not None:
            tried = FORMS[self.tac.form](fitting, held_out, self.tac)
            tried = Affine(matrix=tried.matrix.float(), bias=tried.bias.float())
            before, after = error(found, held_out), error(tried, held_out)
            if after < before:
                found, share = tried, after / before
        self.fit.numbers[f"{site}.tac"] = share
        return found

    def _moments(self, graph: GraphModule, site: str, node: Node, block: int) -> tuple[Moments | None, Moments | None]:
        """Of the rows to fit by and of those held out; None where there are no such canvases."""
        fitting, held_out = None, None
        for full, quantized in self._pairs(graph, site, node):
            fitting = _grown(fitting, full.fitting, quantized.fitting, block)
            held_out = _grown(held_out, full.held_out, quantized.held_out, block)
        return fitting, held_out

    def _pairs(self, graph: GraphModule, site: str, node: Node) -> Iterator[tuple[Rows, Rows]]:
        """The same rows in full precision and quantised, batch by batch."""
        fit = self.fit
        if fit.samples is None or fit.quantized is None or fit.reference is None:
            raise ValueError(f"the output of attention before {site} is compensated by paired samples; there are none")
        full = input_graph(fit.reference, attention_outputs(fit.reference)[site])
        quantized = input_graph(graph, node)
        for one, other in zip(
            fit.samples.map(lambda batch: self._rows(full, batch, f"the input of {site}")),
            fit.quantized.map(lambda batch: self._rows(quantized, batch, f"the quantised input of {site}")),
            strict=True,
        ):
            if one.first != other.first or one.fitting.shape != other.fitting.shape:
                raise ValueError(f"paired samples of {site} differ; got canvas {other.first}, expected {one.first}")
            yield one, other

    def _rows(self, part: GraphModule, batch: Batch, what: str) -> Rows:
        numbers = batch.first + torch.arange(len(batch.valid))
        if batch.first >= self.tac.samples:
            return Rows(first=batch.first, fitting=torch.empty(0), held_out=torch.empty(0))
        with torch.no_grad():
            z: Tensor = part(*batch.inputs)
        kept = batch.valid & (numbers < self.tac.samples)[:, None]
        for number, row, rows in zip(numbers.tolist(), z, kept, strict=True):
            if not bool(row[rows].isfinite().all()):
                raise CalibrationError(
                    f"{what} has values that are not finite in calibration sample {number}; nothing can be learned "
                    "from it: check the weights of the model, or choose other text with "
                    "--set calibration.source=file:PATH"
                )
        held_out = (numbers % FOURTH == HELD_OUT)[:, None]
        return Rows(first=batch.first, fitting=z[kept & ~held_out], held_out=z[kept & held_out])


def _grown(found: Moments | None, full: Tensor, quantized: Tensor, block: int) -> Moments | None:
    """The moments `found` with those of more rows [M, K]."""
    for one, other in zip(torch.split(full, CHUNK), torch.split(quantized, CHUNK), strict=True):
        if len(one):
            new = moments(one, other, block)
            found = new if found is None else merged(found, new)
    return found


def attention_outputs(graph: GraphModule) -> dict[str, Node]:
    """`prepare` of each transformed output of attention, by the site of the linear that reads it.

    Raises ValueError for one that is not transformed alone: compensation comes before all else.
    """
    found = {}
    for linear in calls(graph, aten.linear.default):
        node = node_of(linear.args[0])
        node = node_of(node.args[0]) if is_call(node, ops.fake_quant.default) else node
        if not is_call(node, ops.prepare.default) or not _is_attention_output(node_of(node.args[0])):
            continue
        given = PREPARE.arguments(*node.args)
        if any(given[name] is not None for name in ("norm_weight", "channel_scale", "tac_matrix")):
            raise ValueError(f"the input of {site_of(linear)} is normed, scaled or compensated already")
        if given["left"] is not None:
            found[site_of(linear)] = node
    return found


def _is_attention_output(node: Node) -> bool:
    """flatten(transpose(attention))."""
    if not is_call(node, aten.flatten.using_ints) or not is_call(turned := node.args[0], aten.transpose.int):
        return False
    return any(is_call(node_of(turned).args[0], attention) for attention in ATTENTIONS)
