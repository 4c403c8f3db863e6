"""Transforms that stay orthogonal wherever learning takes them; each site's parameters are its own."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from passes.learned_orthogonal import LearnedOrthogonal, hadamard_factors, random_factors
from passes.learned_transforms import Site, Values, apply_factors, simulated_linear
from passes.quant_spec import QuantSpec
from passes.solvers.draws import generator

SPEC = QuantSpec(w_bits=4, a_bits=4)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed, str(shape)))


def site(a: int, b: int, *, spec: QuantSpec = SPEC) -> Site:
    return Site(weight=drawn(6, a * b, seed=a), bias=None, spec=spec, factors=(a, b))


def learned_of(sites: dict[str, Site], *, seed: int = 0, clips: bool = False, step: float = 0.0) -> LearnedOrthogonal:
    starts = {name: random_factors(each.factors, seed, name) for name, each in sites.items()}
    learned = LearnedOrthogonal(sites, starts, clips=clips)
    for index, parameter in enumerate((*learned.transforms, *learned.clips)):
        parameter.data += step * drawn(*parameter.shape, seed=index)
    return learned


def detached(learned: LearnedOrthogonal) -> dict[str, Values]:
    with torch.no_grad():
        return learned.values()


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 20))
def test_transform_and_fold_undo_each_other(a: int, b: int, seed: int) -> None:
    one = site(a, b)
    values = detached(learned_of({"x": one, "y": site(b, a)}, seed=seed, step=0.5))["x"]
    for factor in values.factors:
        assert (factor.T @ factor - torch.eye(len(factor))).abs().max() <= 1e-5
    x = drawn(7, a * b, seed=seed)
    turned, folded = (apply_factors(each, values.factors).flatten(-2) for each in (x, one.weight))
    assert (turned @ folded.T - x @ one.weight.T).abs().max() <= 1e-4 * (1 + (x @ one.weight.T).abs().max())
    assert values.unfold == values.factors
    assert values.scale is None


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 20))
def test_a_stretch_is_undone_in_the_weight(a: int, b: int, seed: int) -> None:
    one, starts = site(a, b), {"x": random_factors((a, b), seed, "x")}
    roots = [drawn(size, 2 * size, seed=seed + size).double() for size in (a, b)]
    left, right = (root @ root.T / len(root) + torch.eye(len(root)) for root in roots)
    learned = LearnedOrthogonal({"x": one}, starts, clips=False, stretches={"x": (left, right)})
    for index, parameter in enumerate(learned.transforms):
        parameter.data += 0.5 * drawn(*parameter.shape, seed=index)
    values = detached(learned)["x"]
    for factor, unfold in zip(values.factors, values.unfold, strict=True):
        assert (factor.T @ unfold - torch.eye(len(factor))).abs().max() <= 1e-4
    # What is learned turns, and does not stretch: P P^T stays that of the start.
    for factor, stretch in zip(values.factors, (left, right), strict=True):
        assert (factor @ factor.T - stretch @ stretch).abs().max() <= 1e-4 * (stretch @ stretch).abs().max()


@pytest.mark.parametrize("factors_of", [random_factors, hadamard_factors])
def test_starts_are_keyed_by_seed_and_site(factors_of) -> None:  # type: ignore[no-untyped-def]
    first = factors_of((8, 12), 1, "x")
    for factor, size in zip(first, (8, 12), strict=True):
        assert (factor.T @ factor - torch.eye(size)).abs().max() <= 1e-12
    for one, other in zip(first, factors_of((8, 12), 1, "x"), strict=True):
        assert torch.equal(one, other)
    for seed, name in ((2, "x"), (1, "y")):
        assert not any(torch.equal(*pair) for pair in zip(first, factors_of((8, 12), seed, name), strict=True))


def test_hadamard_factors_spread_a_channel_evenly() -> None:
    left, right = hadamard_factors((8, 12), 0, "x")
    assert (torch.kron(left, right).abs() - 96**-0.5).abs().max() <= 1e-12


def test_learning_begins_at_its_starts_among_others_or_alone() -> None:
    sites = {"w": site(4, 3), "x": site(3, 4), "y": site(3, 3)}
    for name, found in detached(learned_of(sites, seed=1)).items():
        for factor, start in zip(found.factors, random_factors(sites[name].factors, 1, name), strict=True):
            assert (factor - start).abs().max() <= 1e-6


@pytest.mark.parametrize("group", [0, 4])
def test_without_clips_nothing_is_clipped_and_with_them_they_start_as_flatquant_s(group: int) -> None:
    spec = QuantSpec(w_bits=4, a_bits=4, w_group=group)
    for clips, ratio in ((False, torch.tensor(1.0)), (True, torch.tensor(4.0).sigmoid())):
        learned = learned_of({"x": site(3, 4, spec=spec)}, clips=clips)
        found = detached(learned)["x"]
        assert found.w_clip.shape == (6, 3 if group else 1)
        for value in (found.clip_lo, found.clip_hi, found.w_clip):
            assert bool((value == ratio).all())
        assert len(learned.clips) == (2 if clips else 0)


@pytest.mark.parametrize("symmetric", [True, False])
def test_every_parameter_learns_from_its_own_site_alone(symmetric: bool) -> None:
    spec = QuantSpec(w_bits=4, a_bits=4, symmetric=symmetric)
    sites = {"x": site(4, 5, spec=spec), "y": site(5, 4, spec=spec)}
    learned = learned_of(sites, clips=True, step=0.1)
    assert len(learned.transforms) + len(learned.clips) == len(learned.of("x")) + len(learned.of("y"))
    output = simulated_linear(drawn(9, 20), sites["x"], learned.values()["x"], torch.zeros(9))
    torch.autograd.backward((output * drawn(9, 6)).sum())
    for parameter in learned.of("x"):
        assert parameter.grad is not None
        assert float(parameter.grad.abs().max()) > 0
    for parameter in learned.of("y"):
        assert parameter.grad is None or not bool(parameter.grad.any())
