"""Learned transforms undo themselves, start as drawn by name, and a linear under them is the one that will run."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from passes import learned_transforms
from passes.gate_transforms import gate_masks, gate_of
from passes.learned_transforms import LearnedTransforms, Site, Values, apply_factors, simulated_linear
from passes.quant_spec import QuantSpec
from passes.solvers.draws import generator
from passes.solvers.kronecker import apply_kronecker, fold_kronecker
from passes.solvers.nearest import round_to_nearest
from plugins.dequantize import dequantize
from plugins.fake_quant import fake_quant
from plugins.prepare import prepare

SPEC = QuantSpec(w_bits=4, a_bits=4)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed, str(shape)))


def site(a: int, b: int, *, scaled: bool = True, spec: QuantSpec = SPEC, gated: bool = False) -> Site:
    return Site(
        weight=drawn(6, a * b, seed=a),
        bias=drawn(6) if b % 2 else None,
        spec=spec,
        factors=(a, b),
        scale=drawn(a * b).abs() + 0.1 if scaled else None,
        gates=gate_masks((a, b), gate_of((a, b), 4)) if gated else None,
    )


def moved(sites: dict[str, Site], seed: int = 0) -> LearnedTransforms:
    """Somewhere else than where learning starts."""
    learned = LearnedTransforms(sites, seed)
    for index, parameter in enumerate((*learned.transforms, *learned.clips)):
        parameter.data += 0.3 * drawn(*parameter.shape, seed=index)
    return learned


def detached(learned: LearnedTransforms) -> dict[str, Values]:
    with torch.no_grad():
        return learned.values()


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 20))
def test_transform_and_fold_undo_each_other(a: int, b: int, seed: int) -> None:
    one = site(a, b)
    values = detached(moved({"x": one, "y": site(b, a)}, seed))["x"]
    x = drawn(7, a * b, seed=seed)
    assert values.scale is not None
    turned = apply_factors(x / values.scale, values.factors).flatten(-2)
    folded = apply_factors(one.weight * values.scale, values.unfold).flatten(-2)
    expected = x.double() @ one.weight.double().T
    # Sums of up to 25 products through factors whose condition is e^(2 x 0.3 x 4) at most.
    assert (turned @ folded.T - expected).abs().max() <= 1e-4 * (1 + expected.abs().max())
    exact = fold_kronecker(one.weight * values.scale, *values.factors)
    assert (folded - exact).abs().max() <= 1e-4 * (1 + exact.abs().max())
    assert (turned - apply_kronecker(x / values.scale, *values.factors)).abs().max() <= 1e-4 * (1 + turned.abs().max())


def test_a_tile_is_turned_as_kronecker_s_product_says() -> None:
    x, left, right = drawn(3, 2, 6), drawn(2, 2), drawn(3, 3)
    found = apply_factors(x, (left, right)).flatten(-2)
    assert (found - x @ torch.kron(left, right)).abs().max() <= 1e-5


def test_the_start_is_an_orthogonal_draw_of_the_site_alone() -> None:
    alone = detached(LearnedTransforms({"x": site(3, 4)}, 1))["x"]
    among = detached(LearnedTransforms({"w": site(4, 3), "x": site(3, 4), "y": site(3, 3)}, 1))["x"]
    others = [LearnedTransforms({"y": site(3, 4)}, 1), LearnedTransforms({"x": site(3, 4)}, 2)]
    for side in (0, 1):
        start = alone.factors[side]
        assert (start @ start.T - torch.eye(len(start))).abs().max() <= 1e-6
        assert (among.factors[side] - start).abs().max() <= 1e-6
        for other in others:
            (found,) = detached(other).values()
            assert (found.factors[side] - start).abs().max() > 0.1
    assert alone.scale is not None
    assert (alone.scale - (drawn(12).abs() + 0.1)).abs().max() <= 1e-6
    ratios = torch.stack([alone.clip_lo, alone.clip_hi, *alone.w_clip.flatten()])
    assert torch.equal(ratios, torch.full((8,), 4.0).sigmoid())


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    "spec",
    [
        SPEC,
        QuantSpec(w_bits=8, a_bits=8, symmetric=False),
        QuantSpec(w_bits=4, a_bits=8, w_group=4, a_group=4),
    ],
)
def test_the_linear_is_the_one_that_will_run(spec: QuantSpec, gated: bool) -> None:
    """Every op of the quantised graph, one after another; a code may differ where float32 sums land on its edge."""
    one = site(4, 5, spec=spec, gated=gated, scaled=False)
    values = detached(moved({"x": one}))["x"]
    left, right = values.factors
    x, masked = drawn(2, 9, 20), drawn(2, 9, seed=2) > 0
    gate = gate_of((4, 5), 4)
    gating = {"state": masked.int(), "gate_axis": gate.axis, "gate_size": gate.size} if gated else {}
    codes = fake_quant(
        prepare(x, left=left, right=right, **gating),  # type: ignore[arg-type]
        spec.a_bits, spec.symmetric, spec.a_group, float(values.clip_lo), float(values.clip_hi),
    )  # fmt: skip
    folded = fold_kronecker(one.weight, left, right)
    grid = round_to_nearest(folded, bits=spec.w_bits, group=spec.w_group, clip=values.w_clip)
    expected = torch.nn.functional.linear(
        codes, dequantize(grid.codes, grid.scale, spec.w_bits, spec.w_group), one.bias
    )
    found = simulated_linear(x, one, values, masked)
    assert float(((found - expected).abs() <= 1e-4 * (1 + expected.abs().max())).double().mean()) >= 0.98


def test_every_parameter_has_a_gradient() -> None:
    sites = {"x": site(4, 5), "y": site(5, 4, scaled=False, spec=QuantSpec(w_bits=4, a_bits=4, symmetric=False))}
    learned = LearnedTransforms(sites, 0)
    values = learned.values()
    for name, one in sites.items():
        output = simulated_linear(drawn(9, 20), one, values[name], torch.zeros(9))
        torch.autograd.backward((output * drawn(9, 6)).sum(), retain_graph=True)
    assert len(learned.transforms) == 5  # turns and diagonals of 4 and of 5, one scale
    for parameter in (*learned.transforms, *learned.clips):
        assert parameter.grad is not None
        assert bool(parameter.grad.isfinite().all())
        assert float(parameter.grad.abs().max()) > 0


def test_large_weights_have_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for large in (10**9, 0):
        monkeypatch.setattr(learned_transforms, "LARGE", large)
        learned = moved({"x": site(4, 5, gated=True)})
        output = simulated_linear(drawn(9, 20), learned.sites["x"], learned.values()["x"], torch.zeros(9))
        found.append((output, *torch.autograd.grad(output.square().sum(), (*learned.transforms, *learned.clips))))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
