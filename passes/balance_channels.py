"""Balance inputs of linears against their weights, for nothing at run time: `solvers/balance.py` has the formulas.

    q_k_v, gate_up     scale of channels, in the gain of the norm before
    down               scale of channels, in the rows of up
    o                  a matrix for each value head, in the rows of v

Shape letters: M rows, K input channels, H query heads, J value heads, C channels a head, g channels of one block.
"""

import torch
from torch import Tensor
from torch.fx import GraphModule

from passes.fit import Batch, Fit, Samples, check_learnable, summed
from passes.fold_scale import FoldScale
from passes.magnitudes import linears_at_hand, needed
from passes.observe import Observed
from passes.producers import attention_before, head_size, producer_of
from passes.quant_spec import QuantPlan
from passes.quantize_weights import float_weight
from passes.solvers.balance import channel_scale, head_transform
from passes.transform_values import TransformValues, ValueTransform


class BalanceChannels:
    """Every linear of the blocks that the plan quantises and whose input channels some weight makes linearly.

    On shapes alone nothing changes. Raises what `check_learnable` does.
    """

    def __init__(self, plan: QuantPlan, fit: Fit) -> None:
        self.plan, self.fit = plan, fit

    def __call__(self, graph: GraphModule) -> int:
        linears = linears_at_hand(graph, self.plan)
        producers = {site: producer_of(graph, linear) for site, (linear, _) in linears.items()}
        made = {site: producer for site, producer in producers.items() if producer is not None}
        if not made:
            return 0
        sizes = {
            site: head_size(attention_before(linears[site][0])) if producer.through == "attention" else 1
            for site, producer in made.items()
        }
        moments = second_moments(graph, needed(self.fit), sizes)
        scales: dict[str, Tensor] = {}
        transforms: dict[str, ValueTransform] = {}
        # All by the weights as they were: what balances one linear scales the outputs of another.
        for site, producer in made.items():
            gram = _squares(float_weight(graph, linears[site][0]), sizes[site])
            if producer.through == "attention":
                heads = len(torch.unique(producer.rows)) // sizes[site]
                transforms[site] = _by_value_head(moments[site], gram, heads)
            else:
                scales[site] = 1 / channel_scale(moments[site].flatten(), gram.flatten())
        changed = FoldScale(scales.get)(graph)
        return changed + (TransformValues(lambda site, _: transforms.get(site))(graph) if transforms else 0)


def second_moments(graph: GraphModule, samples: Samples, sizes: dict[str, int]) -> dict[str, Tensor]:
    """Sum of x^T x over the valid rows, float64 [K/g, g, g] in blocks of g channels, by site and its g.

    One walk over the samples. Raises what `check_learnable` does.
    """

    def measure(batch: Batch) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}

        def watch(site: str, x: Tensor, _: Tensor) -> None:
            if site in sizes:
                check_learnable(x, batch, f"the input of {site}")
                found[site] = _squares(x[batch.valid], sizes[site])

        with torch.no_grad():
            Observed(graph, watch).run(*batch.inputs)
        return found

    return summed(samples.map(measure))


def _squares(rows: Tensor, size: int) -> Tensor:
    """Sum of x^T x of rows [M, K] in blocks of g = `size` channels, float64 [K/g, g, g]."""
    blocks = torch.unflatten(rows.double().T, 0, (-1, size))
    return blocks @ blocks.mT


def _by_value_head(moments: Tensor, gram: Tensor, heads: int) -> ValueTransform:
    """Of the sums [H, C, C] over the query heads that share a value head, side by side."""
    shared = (torch.unflatten(each, 0, (heads, -1)).sum(1) for each in (moments, gram))
    fold = torch.stack([head_transform(x, w) for x, w in zip(*shared, strict=True)])
    return ValueTransform(fold=fold, unfold=torch.linalg.inv(fold).mT)
