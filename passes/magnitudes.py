"""What scales are made from: how large each input channel of each linear is, and sample rows to try them on.

Rows of padding never count. Shape letters: B batch, Q query rows, M sample rows, K input channels.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from passes.fit import Batch, Fit, Samples, check_learnable
from passes.observe import Observed
from passes.quant_spec import QuantPlan, QuantSpec
from passes.quantize_weights import float_weight, planned
from passes.solvers.draws import generator

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Magnitudes:
    """Largest and mean magnitude float32 [K] of the input channels of one linear."""

    amax: Tensor
    mean: Tensor


def linears_at_hand(graph: GraphModule, plan: QuantPlan) -> dict[str, tuple[Node, QuantSpec]]:
    """Linears of the blocks that the plan quantises, by site; none on shapes alone."""
    found = planned(graph, replace(plan, head=None))
    return {site: (linear, spec) for linear, site, spec in found if not float_weight(graph, linear).is_meta}


def needed(fit: Fit) -> Samples:
    """The samples of a pass that cannot do without. Raises ValueError when there are none."""
    if fit.samples is None:
        raise ValueError("this pass learns from activations, and there are no samples")
    return fit.samples


def magnitudes(graph: GraphModule, samples: Samples) -> dict[str, Magnitudes]:
    """Of every linear by site, over all valid rows. Raises what `check_learnable` does."""

    def measure(rows: Tensor) -> tuple[Tensor, Tensor, int]:
        return rows.abs().amax(0), rows.abs().sum(0, dtype=torch.float64), len(rows)

    totals: dict[str, tuple[Tensor, Tensor, int]] = {}
    for found in samples.map(lambda batch: _inputs(graph, batch, batch.valid, measure)):
        for site, (amax, total, count) in found.items():
            if site in totals:
                before = totals[site]
                amax, total, count = torch.maximum(amax, before[0]), total + before[1], count + before[2]
            totals[site] = (amax, total, count)
    return {site: Magnitudes(amax=amax, mean=(total / n).float()) for site, (amax, total, n) in totals.items()}


def sample_rows(graph: GraphModule, samples: Samples, *, limit: int, seed: int) -> dict[str, Tensor]:
    """Inputs [M, K] of every linear by site at M = `limit` valid rows drawn from all, or all where there are fewer.

    The same rows for every site and for any batch size. Raises what `check_learnable` does.
    """
    numbers = {batch.first: _draw(batch, seed) for batch in samples}
    drawn = torch.cat([number.flatten() for number in numbers.values()])
    last = drawn[drawn < 2].sort().values[:limit][-1]
    parts = list(
        samples.map(lambda batch: _inputs(graph, batch, numbers[batch.first] <= last, lambda rows: rows.clone()))
    )
    return {site: torch.cat([part[site] for part in parts]) for site in parts[0]}


def largest_rows(graph: GraphModule, samples: Samples, *, limit: int) -> dict[str, Tensor]:
    """Of every linear by site the `limit` valid input rows with the largest values, in the order of the samples.

    Raises what `check_learnable` does.
    """

    def largest(rows: Tensor) -> Tensor:
        chosen = rows.abs().amax(dim=1).argsort(descending=True, stable=True)[:limit]
        return rows[chosen.sort().values]

    kept: dict[str, Tensor] = {}
    for found in samples.map(lambda batch: _inputs(graph, batch, batch.valid, largest)):
        kept = {site: largest(torch.cat([kept[site], rows])) if site in kept else rows for site, rows in found.items()}
    return kept


def _draw(batch: Batch, seed: int) -> Tensor:
    """A number in 0..1 for each valid row [B, Q], keyed by its sample; 2 for padding."""
    rows, width = batch.valid.shape
    drawn = [
        torch.rand(width, generator=generator(seed, "rows", str(batch.first + row)), dtype=torch.float64)
        for row in range(rows)
    ]
    return torch.where(batch.valid, torch.stack(drawn), 2.0)


def _inputs(graph: GraphModule, batch: Batch, rows: Tensor, reduce: Callable[[Tensor], Result]) -> dict[str, Result]:
    """`reduce` of the chosen rows [B, Q] of every linear's input, by site."""
    found: dict[str, Result] = {}

    def watch(site: str, x: Tensor, _: Tensor) -> None:
        check_learnable(x, batch, f"the input of {site}")
        found[site] = reduce(x[rows])

    with torch.no_grad():
        Observed(graph, watch).run(*batch.inputs)
    return found
