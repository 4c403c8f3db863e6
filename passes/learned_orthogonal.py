"""What SGAT learns for the linears of one block: an orthogonal transform of each, and clip ratios where these learn.

    y = Qa(x P G_s) Qw(P^-1 W^T),    P = left kron right,    each factor (its stretch) (its start) Cayley(S)

P is orthogonal whatever is learned (arXiv 2606.04945, section 3.2, which does not say how it keeps that): a factor is
its start, turned by Cayley's map of free parameters that begin at zero. A dense P is a left factor alone. Beyond the
paper, a fixed symmetric stretch may come first, and P^-1 is P^T no longer.
Shape letters: N outputs, K inner, G groups, a x b = K the Kronecker factors.
"""

from collections import defaultdict
from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from passes.learned_transforms import SIDES, START_CLIP, Site, Values
from passes.solvers.cayley import cayley
from passes.solvers.draws import generator
from passes.solvers.hadamard import random_orthogonal, rotation

Factors = tuple[Tensor, Tensor]


def random_factors(sizes: tuple[int, int], seed: int, site: str) -> Factors:
    """Uniform over the orthogonal matrices [a, a] and [b, b], float64, keyed by `seed` and `site`."""
    left, right = (
        random_orthogonal(size, generator(seed, site, side)) for size, side in zip(sizes, SIDES, strict=True)
    )
    return left, right


def hadamard_factors(sizes: tuple[int, int], seed: int, site: str) -> Factors:
    """Randomised Hadamard matrices [a, a] and [b, b], float64, keyed by `seed` and `site`."""
    draws = (generator(seed, site, side) for side in SIDES)
    left, right = (rotation(size, draw) for size, draw in zip(sizes, draws, strict=True))
    return left, right


class LearnedOrthogonal:
    """The parameters of sites that begin at `starts`; `values` makes of them what a forward pass needs.

    Without `clips` nothing is clipped, and there is no parameter for it; a site without `stretches` has none.
    """

    def __init__(
        self,
        sites: Mapping[str, Site],
        starts: Mapping[str, Factors],
        *,
        clips: bool,
        stretches: Mapping[str, Factors] = MappingProxyType({}),
    ) -> None:
        self.sites = sites
        self._stretches = stretches
        self._starts = {name: tuple(factor.float() for factor in starts[name]) for name in sites}
        self._turns = {name: [_leaf(torch.zeros_like(factor)) for factor in self._starts[name]] for name in sites}
        clipped = sites if clips else {}
        self._clips = {
            name: [_leaf(START_CLIP * ratio) for ratio in _unclipped(site)] for name, site in clipped.items()
        }

    @property
    def transforms(self) -> list[Tensor]:
        """Parameters of all factors."""
        return [turn for turns in self._turns.values() for turn in turns]

    @property
    def clips(self) -> list[Tensor]:
        """Parameters of all clip ratios."""
        return [clip for clips in self._clips.values() for clip in clips]

    def of(self, site: str) -> list[Tensor]:
        """Parameters of one site: no other site's error depends on them."""
        return [*self._turns[site], *self._clips.get(site, ())]

    def values(self) -> dict[str, Values]:
        """By site, as the parameters stand."""
        factors = self._factors()
        found = {}
        for name, site in self.sites.items():
            ends, w_clip = [clip.sigmoid() for clip in self._clips[name]] if self._clips else _unclipped(site)
            left, right = (factors[name, side] for side in SIDES)
            found[name] = Values(
                factors=stretched((left, right), self._stretches.get(name)),
                unfold=unstretched((left, right), self._stretches.get(name)),
                scale=None,
                clip_lo=ends[0],
                clip_hi=ends[1],
                w_clip=w_clip,
            )
        return found

    def _factors(self) -> dict[tuple[str, str], Tensor]:
        """Factors of one size side by side: Cayley's map solves them all at once."""
        places: dict[int, list[tuple[str, int]]] = defaultdict(list)
        for name, starts in self._starts.items():
            for side, start in enumerate(starts):
                places[len(start)].append((name, side))
        found = {}
        for each in places.values():
            turned = cayley(torch.stack([self._turns[name][side] for name, side in each]))
            for (name, side), turn in zip(each, turned.unbind(), strict=True):
                found[name, SIDES[side]] = self._starts[name][side] @ turn
        return found


def stretched(factors: Factors, stretch: Factors | None) -> Factors:
    """Each factor after its symmetric stretch, in the factors' type."""
    if stretch is None:
        return factors
    left, right = (each.to(factor) @ factor for each, factor in zip(stretch, factors, strict=True))
    return left, right


def unstretched(factors: Factors, stretch: Factors | None) -> Factors:
    """The inverse transposes of `stretched` orthogonal factors, which are their own without a stretch."""
    return stretched(factors, None if stretch is None else _inverse(stretch))


def _inverse(stretch: Factors) -> Factors:
    left, right = (torch.linalg.inv(each) for each in stretch)
    return left, right


def _unclipped(site: Site) -> tuple[Tensor, Tensor]:
    """Ratios of one for the lower and the upper end of activations, and for each group of weights [N, G]."""
    outer, inner = site.weight.shape
    return torch.ones(2), torch.ones(outer, inner // (site.spec.w_group or inner))


def _leaf(start: Tensor) -> Tensor:
    return start.clone().requires_grad_()
