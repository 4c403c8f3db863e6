"""QuaRot and DuQuant as lists of passes: what each option and format adds, and what rotating is good for."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from passes.base import run
from passes.fit import Fit
from passes.graph import attributes
from passes.invariants import check_quantized
from passes.methods import METHODS
from passes.options import DuQuant, Options, QuaRot
from passes.quant_spec import AttentionSpec, QuantPlan, QuantSpec
from passes.solvers.clip import clip_ratios
from passes.solvers.nearest import round_to_nearest
from tests.passes.blocks import SITES, block, samples
from tests.passes.rewrites import on_shapes
from tests.passes.samples import Listed
from tests.passes.sketch import copy_of, count, ops

W4A4 = QuantPlan(linear=QuantSpec(w_bits=4, a_bits=4), head=None)
STEPS = DuQuant(steps=16)


def with_options(**options: QuaRot | DuQuant) -> QuantPlan:
    return replace(W4A4, options=Options(**options))


def rewritten(method: str, plan: QuantPlan, graph: GraphModule, given: Listed, fit: Fit | None = None) -> GraphModule:
    made = copy_of(graph)
    run(made, METHODS[method].rewrite(plan, fit or Fit(samples=given)), lambda _: None)
    return made


def quantised(method: str, plan: QuantPlan, graph: GraphModule, given: Listed) -> GraphModule:
    made, fit = copy_of(graph), Fit(samples=given)
    run(made, METHODS[method].passes(plan, fit), check_quantized)
    return made


def output_error(graph: GraphModule, other: GraphModule, given: Listed) -> float:
    """Sum over the batches of the mean square by which the blocks' outputs differ."""
    return sum(float((other(*b.inputs) - graph(*b.inputs))[b.valid].square().mean()) for b in given)


@pytest.mark.parametrize(
    ("method", "spec", "k_bits", "prepares", "rotates"),
    [
        ("quarot", QuantSpec(w_bits=4, a_bits=4), 16, 2, 0),
        ("quarot", QuantSpec(w_bits=4, a_bits=4), 4, 2, 2),
        ("quarot", QuantSpec(w_bits=4, w_group=8), 16, 0, 0),
        ("duquant", QuantSpec(w_bits=4, a_bits=4), 16, 0, 8),
        ("duquant", QuantSpec(w_bits=8, a_bits=8), 8, 0, 10),
    ],
)
def test_nodes_at_run_time(method: str, spec: QuantSpec, k_bits: int, prepares: int, rotates: int) -> None:
    plan = replace(with_options(duquant=STEPS), linear=spec, attention=AttentionSpec(k_bits=k_bits))
    made = rewritten(method, plan, block(), samples())
    assert (count(made, ops.prepare.default), count(made, ops.rotate.default)) == (prepares, rotates)
    shapes = rewritten(method, plan, on_shapes(block()), samples(), Fit())
    assert str(shapes.graph) == str(made.graph)


def codes(graph: GraphModule) -> list[Tensor]:
    return [attributes(graph)[f"{site}.codes"] for site in SITES]


def test_quarot_rounds_its_rotated_weights_as_its_options_say() -> None:
    graph, given = block(), samples()
    weights = attributes(rewritten("quarot", W4A4, graph, given))
    for clip in (False, True):
        found = attributes(
            quantised("quarot", with_options(quarot=QuaRot(weights="rtn", clip_weights=clip)), graph, given)
        )
        for site in SITES:
            weight = weights[f"{site}.weight"]
            ratio = clip_ratios(weight, bits=4, group=0, symmetric=True) if clip else None
            grid = round_to_nearest(weight, bits=4, group=0, clip=ratio)
            assert torch.equal(found[f"{site}.codes"], grid.codes)
            assert torch.equal(found[f"{site}.w_scale"], grid.scale)
    gptq = quantised("quarot", W4A4, graph, given)
    assert all(not torch.equal(one, found[f"{site}.codes"]) for one, site in zip(codes(gptq), SITES, strict=True))


def test_duquant_clips_weights_and_activations_by_its_ratios() -> None:
    graph, given = block(), samples()
    plan = with_options(duquant=replace(STEPS, a_clip=0.75, w_clip=0.5))
    fit = Fit(samples=given)
    weights = attributes(rewritten("duquant", plan, graph, given, fit))
    assert fit.numbers == {f"{site}.{end}": 0.75 for site in SITES for end in ("clip_lo", "clip_hi")}
    made = quantised("duquant", plan, graph, given)
    for site in SITES:
        largest = weights[f"{site}.weight"].abs().amax(1, keepdim=True)
        assert (attributes(made)[f"{site}.w_scale"] - largest * 0.5 / 7).abs().max() <= 1e-6 * largest.max()
    assert {node.args[4:] for node in made.graph.nodes if node.target is ops.fake_quant.default} == {(0.75, 0.75)}
    gptq = quantised("duquant", with_options(duquant=replace(STEPS, weights="gptq")), graph, given)
    assert all(not torch.equal(a, b) for a, b in zip(codes(gptq), codes(made), strict=True))


def test_duquant_hurts_less_than_rounding() -> None:
    graph, given = block(), samples(loud=30.0)
    errors = {
        method: output_error(graph, quantised(method, with_options(duquant=STEPS), graph, given), given)
        for method in ("rtn", "duquant")
    }
    assert errors["duquant"] <= 0.75 * errors["rtn"]
