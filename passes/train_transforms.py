"""Learn transforms, scales and clips for the linears of one block, so that quantised it gives what it gives in float.

FlatQuant (arXiv 2410.09426): AdamW on the squared error of the block's output, on float inputs, cosine schedule.
Shape letters: B batch, Q query rows, D hidden, K inner, a x b = K the Kronecker factors.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR

from passes.fit import Batch, CalibrationError, Fit, Samples
from passes.gate_transforms import gate_masks, gate_of, gated_factors
from passes.graph import attribute, is_call, node_of, site_of
from passes.insert_transform import Transform
from passes.learned_transforms import LearnedTransforms, Site, Values, simulated_linear
from passes.magnitudes import magnitudes
from passes.options import FlatQuant, Star
from passes.producers import attention_before, head_size, producer_of
from passes.quant_spec import QuantPlan
from passes.quantize_weights import float_weight, planned
from passes.solvers.kronecker import factor_pairs
from passes.solvers.smooth import smoothing_scale

LAST_RATE = 1e-3  # the rate at the end of the cosine, as a share of the first


class Learned(Protocol):
    """Parameters in two groups: `clips` learn at a rate of their own."""

    @property
    def transforms(self) -> list[Tensor]: ...

    @property
    def clips(self) -> list[Tensor]: ...

    def values(self) -> dict[str, Values]:
        """By site, as the parameters stand."""


class TrainTransforms:
    """Fills `transforms` and `scales` by site for the passes after it, and `fit` with clip ratios; the graph stays.

    On shapes alone the transforms have shapes alone. With `share` each mask state has K / `share` coordinates of its
    own while transforms are learned. The head is left alone.
    """

    def __init__(self, plan: QuantPlan, fit: Fit, *, share: int | None = None) -> None:
        self.plan, self.fit, self.share = replace(plan, head=None), fit, share
        self.transforms: dict[str, Transform] = {}
        self.scales: dict[str, Tensor] = {}

    def __call__(self, graph: GraphModule) -> int:
        linears = list(planned(graph, self.plan))
        if not linears:
            return 0
        if float_weight(graph, linears[0][0]).is_meta:
            for linear, site, _ in linears:
                left, right = (torch.empty(size, size, device="meta") for size in self._factors(graph, linear))
                self.transforms[site] = Transform(left=left, right=right)
            return len(linears)
        if self.fit.samples is None:
            raise ValueError("transforms are learned from samples, and there are none")
        options = self.plan.options.flatquant
        sites = self.sites(graph, self.fit.samples)
        values = train(graph, sites, self.fit.samples, options=options, seed=self.fit.seed)
        for site, found in values.items():
            self._keep(site, found)
        return len(linears)

    def sites(self, graph: GraphModule, samples: Samples) -> dict[str, Site]:
        """Where there is something to learn, and where learning starts."""
        seen, alpha = magnitudes(graph, samples), self.plan.options.flatquant.alpha
        sites = {}
        for linear, site, spec in planned(graph, self.plan):
            weight, producer, bias = float_weight(graph, linear), producer_of(graph, linear), None
            if len(linear.args) > 2 and linear.args[2] is not None:
                bias = attribute(graph, node_of(linear.args[2]))
            sizes = self._factors(graph, linear)
            scaled = producer is not None and producer.through != "attention"
            sites[site] = Site(
                weight=weight,
                bias=bias,
                spec=spec,
                factors=sizes,
                scale=smoothing_scale(seen[site].amax, weight.abs().amax(dim=0), alpha) if scaled else None,
                gates=gate_masks(sizes, gate_of(sizes, self.share)) if self.share else None,
            )
        return sites

    def _factors(self, graph: GraphModule, linear: Node) -> tuple[int, int]:
        """Heads by channels of a head behind attention, as in the paper, else as close as can be."""
        width = float_weight(graph, linear).shape[1]
        producer = producer_of(graph, linear)
        if producer is None or producer.through != "attention":
            return gated_factors(width, self.share) if self.share else factor_pairs(width)[0]
        size = head_size(attention_before(linear))
        return width // size, size

    def _keep(self, site: str, found: Values) -> None:
        left, right = found.factors
        self.transforms[site] = Transform(left=left, right=right)
        if found.scale is not None:
            self.scales[site] = found.scale
        keep_clips(self.fit, site, found)


class Simulated(Interpreter):
    """A float graph in which the linears of `sites` run quantised on the rows that count, and give zeros elsewhere."""

    def __init__(
        self, graph: GraphModule, sites: Mapping[str, Site], values: Mapping[str, Values], batch: Batch
    ) -> None:
        super().__init__(graph)
        self.sites, self.values, self.batch = sites, values, batch

    def run_node(self, n: Node) -> Any:
        if not is_call(n, torch.ops.aten.linear.default) or (name := site_of(n)) not in self.sites:
            return super().run_node(n)
        x: Tensor = self.fetch_args_kwargs_from_env(n)[0][0]
        valid, site = self.batch.valid, self.sites[name]
        output = x.new_zeros(*valid.shape, len(site.weight))
        output[valid] = simulated_linear(x[valid], site, self.values[name], self.batch.masked[valid])
        return output


def train(
    graph: GraphModule, sites: Mapping[str, Site], samples: Samples, *, options: FlatQuant, seed: int
) -> dict[str, Values]:
    """What AdamW finds for `sites` of the block `graph`. Raises CalibrationError when an error is not finite."""
    learned = LearnedTransforms(sites, seed)
    parameters = (*learned.transforms, *learned.clips)

    def take(step: list[Batch]) -> None:
        total = sum(_descend(graph, learned, part) for part in step)
        # The paper's normalisation: a step weighs the same, whatever the size of its error.
        for parameter in parameters:
            assert parameter.grad is not None
            parameter.grad /= max(total, torch.finfo(torch.float32).tiny)

    return learn(learned, samples, take, options, "flatquant.rate")


def learn(
    learned: Learned, samples: Samples, take: Callable[[list[Batch]], None], options: FlatQuant | Star, rate: str
) -> dict[str, Values]:
    """Where AdamW ends on a cosine over all steps; `take` leaves a step's gradients. Clips at rate 0 stand still.

    Raises CalibrationError, naming the option that is its `rate`, when what is learned is not finite.
    """
    groups: list[dict[str, Any]] = [{"params": learned.transforms}]
    # A group of rate zero would not stand still: the cosine has one last rate for all groups.
    if options.clip_rate:
        groups.append({"params": learned.clips, "lr": options.rate * options.clip_rate})
    optimizer = AdamW(groups, lr=options.rate, fused=True)
    num_steps = options.epochs * sum(1 for _ in _steps(samples, options.batch))
    schedule = CosineAnnealingLR(optimizer, T_max=num_steps, eta_min=options.rate * LAST_RATE)
    for _ in range(options.epochs):
        for step in _steps(samples, options.batch):
            for parameter in (*learned.transforms, *learned.clips):
                parameter.grad = None
            take(step)
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        values = learned.values()
    _check_finite(values, rate)
    return values


def keep_clips(fit: Fit, site: str, found: Values) -> None:
    """Leave the clip ratios of `site` for the passes that clip."""
    fit.numbers[f"{site}.clip_lo"] = float(found.clip_lo)
    fit.numbers[f"{site}.clip_hi"] = float(found.clip_hi)
    fit.tensors[f"{site}.w_clip"] = found.w_clip


def squared_error(graph: GraphModule, learned: LearnedTransforms, batch: Batch) -> Tensor:
    """Squared error of the quantised block's output, summed over the rows that count."""
    with torch.no_grad():
        target = graph(*batch.inputs)
    output: Tensor = Simulated(graph, learned.sites, learned.values(), batch).run(*batch.inputs)
    error: Tensor = (output - target)[batch.valid].square().sum()
    return error


def _descend(graph: GraphModule, learned: LearnedTransforms, part: Batch) -> float:
    """Add the gradients of this part's error to those of the step, and return the error."""
    with torch.enable_grad():
        error = squared_error(graph, learned, part)
        torch.autograd.backward(error)
    found = float(error.detach())
    if not math.isfinite(found):
        raise CalibrationError(
            f"the error of calibration samples {part.first} to {part.first + len(part.valid) - 1} is {found} while "
            "transforms are learned; expected a finite number: try a smaller flatquant.rate"
        )
    return found


def _check_finite(values: Mapping[str, Values], rate: str) -> None:
    """The last step is followed by no error that would show what it did."""
    for site, found in values.items():
        numbers = [*found.factors, *found.unfold, found.clip_lo, found.clip_hi, found.w_clip]
        if found.scale is not None:
            numbers.append(found.scale.log())  # a scale of zero cannot be folded
        if not all(bool(each.isfinite().all()) for each in numbers):
            raise CalibrationError(
                f"what was learned for {site} is not finite; expected finite transforms, positive scales and clips: "
                f"try a smaller {rate}"
            )


def _steps(samples: Samples, size: int) -> Iterator[list[Batch]]:
    """The same samples in order, `size` a step; in several parts where the batches of long ones are smaller."""
    step: list[Batch] = []
    missing = size
    for batch in samples:
        start = 0
        while start < len(batch.valid):
            step.append(_cut(batch, slice(start, start + missing)))
            start += missing
            missing -= len(step[-1].valid)
            if not missing:
                yield step
                step, missing = [], size
    if step:
        yield step


def _cut(batch: Batch, part: slice) -> Batch:
    return Batch(
        inputs=tuple(value[part] for value in batch.inputs),
        valid=batch.valid[part],
        masked=batch.masked[part],
        noise=batch.noise[part],
        first=batch.first + part.start,
    )
