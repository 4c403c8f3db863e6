"""What is learned for the linears of one block: an invertible transform, a channel scale and clip ratios of each.

    y = Qa(T(x / s)) Qw((W diag(s)) T^-T)^T,   T = left kron right,   each factor U diag(e^d) V^T

U and V are orthogonal by Cayley's map, from a random start (FlatQuant, arXiv 2410.09426, section 3). Scales and
diagonals are kept as logarithms, so that no step makes a transform singular; clip ratios are sigmoids.
Apart from the released code: there Cayley's parameters start at those of the random matrix, here at zero beside it,
so that AdamW's decay pulls to the start and not to the identity; there scales and diagonals are no logarithms, and a
row of a weight has two clips, here one.
Shape letters: N outputs, K inner, G groups, a x b = K the Kronecker factors.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from passes.quant_spec import QuantSpec
from passes.solvers.cayley import cayley
from passes.solvers.draws import generator
from passes.solvers.hadamard import random_orthogonal
from passes.solvers.straight_through import fake_quant_through, quantize_weight_through

START_CLIP = 4.0  # sigmoid(4) = 0.982, as the paper's code starts
SIDES = ("left", "right")
LARGE = 1 << 24  # of so many weights the steps to their grid are taken twice, not kept: five copies of 400 MB


@dataclass(frozen=True, kw_only=True)
class Site:
    """One linear: weight [N, K], (a, b), the scale [K] to start from (None: not scaled), gates [2, a, b] by state."""

    weight: Tensor
    bias: Tensor | None
    spec: QuantSpec
    factors: tuple[int, int]
    scale: Tensor | None = None
    gates: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Values:
    """Where the learning stands at one site; `unfold` are the inverse transposes of the factors, (left, right)."""

    factors: tuple[Tensor, Tensor]
    unfold: tuple[Tensor, Tensor]
    scale: Tensor | None
    clip_lo: Tensor
    clip_hi: Tensor
    w_clip: Tensor


class LearnedTransforms:
    """The parameters; `values` makes of them what a forward pass needs, with gradients."""

    def __init__(self, sites: Mapping[str, Site], seed: int) -> None:
        self.sites = sites
        # Factors of one size lie side by side: Cayley's map solves them all at once.
        self._places: dict[tuple[str, str], tuple[int, int]] = {}
        starts: dict[int, list[Tensor]] = defaultdict(list)
        for name, site in sites.items():
            for side, size in zip(SIDES, site.factors, strict=True):
                self._places[name, side] = (size, len(starts[size]))
                draws = (generator(seed, name, side, part) for part in ("u", "v"))
                starts[size].append(torch.stack([random_orthogonal(size, draw).float() for draw in draws]))
        self._starts = {size: torch.stack(each) for size, each in starts.items()}
        self._turns = {size: _leaf(torch.zeros_like(start)) for size, start in self._starts.items()}
        self._diagonals = {size: _leaf(start.new_zeros(len(start), 1, size)) for size, start in self._starts.items()}
        self._scales = {name: _leaf(site.scale.log()) for name, site in sites.items() if site.scale is not None}
        self._clips = {name: _leaf(torch.full((2,), START_CLIP)) for name in sites}
        self._w_clips = {name: _leaf(torch.full(_groups(site), START_CLIP)) for name, site in sites.items()}

    @property
    def transforms(self) -> list[Tensor]:
        """Parameters of factors and scales."""
        return [*self._turns.values(), *self._diagonals.values(), *self._scales.values()]

    @property
    def clips(self) -> list[Tensor]:
        """Parameters of the clip ratios."""
        return [*self._clips.values(), *self._w_clips.values()]

    def values(self) -> dict[str, Values]:
        """By site, as the parameters stand."""
        folds, unfolds = {}, {}
        for size, turns in self._turns.items():
            u, v = (self._starts[size] @ cayley(turns)).unbind(1)
            stretch = self._diagonals[size].exp()
            folds[size], unfolds[size] = ((u * stretch) @ v.mT).unbind(), ((u / stretch) @ v.mT).unbind()
        found = {}
        for name in self.sites:
            (a, i), (b, j) = (self._places[name, side] for side in SIDES)
            clip_lo, clip_hi = torch.sigmoid(self._clips[name])
            found[name] = Values(
                factors=(folds[a][i], folds[b][j]),
                unfold=(unfolds[a][i], unfolds[b][j]),
                scale=self._scales[name].exp() if name in self._scales else None,
                clip_lo=clip_lo,
                clip_hi=clip_hi,
                w_clip=torch.sigmoid(self._w_clips[name]),
            )
        return found


def simulated_linear(x: Tensor, site: Site, values: Values, state: Tensor) -> Tensor:
    """The quantised linear on x [..., K] as it will run, differentiable in `values`; `state` [...] is 1 for masked."""
    spec = site.spec
    tile = apply_factors(x if values.scale is None else x / values.scale, values.factors)
    if site.gates is not None:
        tile = tile * site.gates[state.long()]
    inputs = fake_quant_through(
        tile.flatten(-2),
        bits=spec.a_bits,
        symmetric=spec.symmetric,
        a_group=spec.a_group,
        clip_lo=values.clip_lo,
        clip_hi=values.clip_hi,
    )
    if site.weight.numel() < LARGE:
        weight = weight_on_grid(site, values)
    else:
        weight = checkpoint(weight_on_grid, site, values, use_reentrant=False, preserve_rng_state=False)
    return F.linear(inputs, weight, site.bias)


def weight_on_grid(site: Site, values: Values) -> Tensor:
    """The weight [N, K] that such a linear multiplies by."""
    weight = site.weight if values.scale is None else site.weight * values.scale
    folded = apply_factors(weight, values.unfold).flatten(-2)
    return quantize_weight_through(folded, bits=site.spec.w_bits, w_group=site.spec.w_group, clip=values.w_clip)


def apply_factors(rows: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """x (left kron right) for each x of `rows` [..., K], as tiles [..., a, b], in the type of `rows`."""
    left, right = factors
    tiles = torch.unflatten(rows, -1, (left.shape[0], right.shape[0]))
    return ((tiles @ right).mT @ left).mT


def _leaf(start: Tensor) -> Tensor:
    return start.clone().requires_grad_()


def _groups(site: Site) -> tuple[int, int]:
    outer, inner = site.weight.shape
    return outer, math.ceil(inner / (site.spec.w_group or inner))
