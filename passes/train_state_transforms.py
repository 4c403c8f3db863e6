"""Learn for every linear the transform under which its own output, quantised and gated by state, is closest to float.

SGAT (arXiv 2606.04945, section 3.2): of each linear alone the error

    sum over states s of || X^s W^T - Qa(X^s P G_s) Qw(P^T W^T) ||^2

on float inputs, AdamW over batches of canvases, quantisers straight-through, only P (and clips by option) learned.
The linears of a block learn at once, in one walk over the samples: no error depends on another's transform.
Shape letters: B batch, Q query rows, K inner, a x b = K the Kronecker factors.
"""

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.fx import GraphModule

from passes.fit import Batch, CalibrationError, Fit, Samples, check_learnable, summed
from passes.gate_transforms import Gate, gate_masks, gate_of, gated_factors
from passes.graph import attribute, calls, node_of, site_of
from passes.hessians import hessian
from passes.insert_transform import Transform
from passes.learned_orthogonal import Factors, LearnedOrthogonal, hadamard_factors, random_factors, stretched
from passes.learned_transforms import Site, Values, apply_factors, simulated_linear
from passes.magnitudes import needed
from passes.observe import Observed
from passes.options import Star
from passes.quant_spec import QuantPlan
from passes.quantize_weights import float_weight, planned
from passes.solvers.draws import generator
from passes.solvers.kronecker_balance import kronecker_stretch
from passes.solvers.state_basis import moments_along, state_basis
from passes.train_transforms import keep_clips, learn

STATES = ("unmasked", "masked")
SHARE = "star.share"


class TrainStateTransforms:
    """Fills `transforms` by site for the pass after it, and `fit` with clip ratios where clips learn; the graph stays.

    On shapes alone the transforms have shapes alone. The head is left alone. Raises CalibrationError for a tile
    without room for gates, for samples that lack a state, and for inputs or errors that nothing can be learned from.
    """

    def __init__(self, plan: QuantPlan, fit: Fit) -> None:
        self.plan, self.fit, self.options = replace(plan, head=None), fit, plan.options.star
        self.transforms: dict[str, Transform] = {}

    def __call__(self, graph: GraphModule) -> int:
        sites = self.sites(graph)
        if not sites:
            return 0
        if next(iter(sites.values())).weight.is_meta:
            found = {name: _shapes(site.factors) for name, site in sites.items()}
        elif self.options.transform == "hadamard":
            made = self._stretches(graph, sites)
            found = {
                name: stretched(hadamard_factors(site.factors, self.fit.seed, name), made.get(name))
                for name, site in sites.items()
            }
        else:
            found = self._learned(graph, sites, needed(self.fit))
        self.transforms.update({name: Transform(left=left, right=right) for name, (left, right) in found.items()})
        return len(sites)

    def sites(self, graph: GraphModule) -> dict[str, Site]:
        """Linears of the plan, their tiles and gates."""
        found = {}
        for linear, name, spec in planned(graph, self.plan):
            weight, bias = float_weight(graph, linear), None
            if len(linear.args) > 2 and linear.args[2] is not None:
                bias = attribute(graph, node_of(linear.args[2]))
            sizes = self._factors(weight.shape[1])
            gates = gate_masks(sizes, self._gate(sizes))
            found[name] = Site(weight=weight, bias=bias, spec=spec, factors=sizes, gates=gates)
        return found

    def _factors(self, width: int) -> tuple[int, int]:
        tile = self.options.tile
        if self.options.transform == "dense":
            return width, 1
        return (width // tile, tile) if tile and width % tile == 0 else gated_factors(width, self.options.share)

    def starts(
        self, graph: GraphModule, sites: Mapping[str, Site], samples: Samples, made: Mapping[str, Factors]
    ) -> dict[str, Factors]:
        """Where learning begins: at random, or with gates where the other state has least, `made` the stretches."""
        seed = self.fit.seed
        if self.options.init == "random":
            return {name: random_factors(site.factors, seed, name) for name, site in sites.items()}
        gates = {name: self._gate(site.factors) for name, site in sites.items()}
        moments = state_moments(graph, sites, gates, samples, made)
        found = {}
        for name, site in sites.items():
            unmasked, masked = (moments[name, state] for state in STATES)
            basis = state_basis(masked, unmasked, gates[name].size, generator(seed, name, "basis"))
            left, right = hadamard_factors(site.factors, seed, name)
            found[name] = (basis, right) if gates[name].axis == 0 else (left, basis)
        return found

    def _stretches(self, graph: GraphModule, sites: Mapping[str, Site]) -> dict[str, Factors]:
        return stretches(graph, sites, needed(self.fit)) if self.options.balance == "kronecker" else {}

    def _gate(self, sizes: tuple[int, int]) -> Gate:
        return gate_of(sizes, self.options.share, SHARE)

    def _learned(self, graph: GraphModule, sites: Mapping[str, Site], samples: Samples) -> dict[str, Factors]:
        check_states(samples, next(iter(sites)))
        made = self._stretches(graph, sites)
        learned = LearnedOrthogonal(
            sites, self.starts(graph, sites, samples, made), clips=self.options.clip_rate > 0, stretches=made
        )
        values = train(graph, learned, samples, options=self.options)
        if self.options.clip_rate:
            for name, each in values.items():
                keep_clips(self.fit, name, each)
        return {name: each.factors for name, each in values.items()}


def check_states(samples: Samples, site: str) -> None:
    """Raise CalibrationError, naming `site`, unless there are rows of both states."""
    total = masked = 0
    for batch in samples:
        total, masked = total + int(batch.valid.sum()), masked + int((batch.masked & batch.valid).sum())
    for state, count in zip(STATES, (total - masked, masked), strict=True):
        if not count:
            raise CalibrationError(
                f"none of the {total} calibration rows at {site} is {state}; its transform is learned from masked and "
                "from unmasked ones: pass --set calibration.states=noised and more of calibration.samples"
            )


@torch.no_grad()
def state_moments(
    graph: GraphModule,
    sites: Mapping[str, Site],
    gates: Mapping[str, Gate],
    samples: Samples,
    made: Mapping[str, Factors],
) -> dict[tuple[str, str], Tensor]:
    """Of each site's input, stretched by `made`, along its gated axis, by site and state.

    Raises what `check_learnable` does.
    """

    def measure(batch: Batch) -> dict[tuple[str, str], Tensor]:
        found = {}

        def watch(name: str, x: Tensor, _: Tensor) -> None:
            if name in sites:
                check_learnable(x, batch, f"the input of {name}")
                if name in made:
                    x = apply_factors(x.double(), made[name]).flatten(-2)
                for state, chosen in zip(STATES, (~batch.masked, batch.masked), strict=True):
                    found[name, state] = moments_along(x[chosen & batch.valid], sites[name].factors, gates[name].axis)

        Observed(graph, watch).run(*batch.inputs)
        return found

    return summed(samples.map(measure))


def stretches(graph: GraphModule, sites: Mapping[str, Site], samples: Samples) -> dict[str, Factors]:
    """What balances each site's input against its weight, by factors. Raises what `hessian` does."""
    found = {}
    for linear in calls(graph, torch.ops.aten.linear.default):
        if (site := sites.get(site_of(linear))) is not None:
            moments = hessian(graph, linear, samples)
            found[site_of(linear)] = kronecker_stretch(moments, site.weight.T @ site.weight, site.factors)
    return found


def train(graph: GraphModule, learned: LearnedOrthogonal, samples: Samples, *, options: Star) -> dict[str, Values]:
    """What AdamW finds for the sites of the block `graph`. Raises CalibrationError when an error is not finite."""
    return learn(learned, samples, lambda step: _descend(graph, learned, step), options, "star.rate")


def squared_errors(graph: GraphModule, learned: LearnedOrthogonal, batch: Batch) -> dict[str, Tensor]:
    """Squared error of each site's output, summed over the rows that count."""
    rows: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(name: str, x: Tensor, output: Tensor) -> None:
        if name in learned.sites:
            rows[name] = (x[batch.valid], output[batch.valid])

    with torch.no_grad():
        Observed(graph, watch).run(*batch.inputs)
    values, state, found = learned.values(), batch.masked[batch.valid], {}
    for name, (x, target) in rows.items():
        output = simulated_linear(x, learned.sites[name], values[name], state)
        found[name] = (output - target).square().sum()
    return found


def _descend(graph: GraphModule, learned: LearnedOrthogonal, step: list[Batch]) -> None:
    """Gradients of this step's errors, each divided by its size: a step weighs the same at every site."""
    totals: dict[str, float] = defaultdict(float)
    for part in step:
        with torch.enable_grad():
            found = squared_errors(graph, learned, part)
            torch.autograd.backward(list(found.values()))
        for name, error in found.items():
            totals[name] += _finite(float(error.detach()), name, part)
    for name, total in totals.items():
        for parameter in learned.of(name):
            assert parameter.grad is not None
            parameter.grad /= max(total, torch.finfo(torch.float32).tiny)


def _finite(error: float, site: str, part: Batch) -> float:
    if not math.isfinite(error):
        raise CalibrationError(
            f"the error of {site} in calibration samples {part.first} to {part.first + len(part.valid) - 1} is {error} "
            "while its transform is learned; expected a finite number: try a smaller star.rate"
        )
    return error


def _shapes(sizes: tuple[int, int]) -> Factors:
    left, right = (torch.empty(size, size, device="meta") for size in sizes)
    return left, right
