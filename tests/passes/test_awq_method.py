"""AWQ on a block: codes of the textbook's steps, the function as it was before them, error never above RTN's."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from passes.base import run
from passes.fit import Fit
from passes.fold_scale import FoldScale
from passes.graph import attributes, calls, site_of
from passes.invariants import check_quantized, check_rewritten
from passes.methods import METHODS
from passes.options import Awq, Options
from passes.quant_spec import QuantPlan, QuantSpec
from pipeline.capture import capture_whole
from plugins.dequantize import dequantize
from tests.passes.blocks import SITES, block, samples
from tests.passes.sketch import aten, copy_of, count, ops
from tests.passes.test_awq import format_of
from tests.passes.test_magnitudes import all_inputs
from tests.pipeline.random_models import tiny

AWQ = METHODS["awq"]
SPECS = {
    "w4a16": QuantSpec(w_bits=4, w_group=16, w_symmetric=False),
    "w3a16": QuantSpec(w_bits=3, w_group=16, w_symmetric=False),
    "w4a4": QuantSpec(w_bits=4, a_bits=4),
    "w8a8": QuantSpec(w_bits=8, a_bits=8),
}
FEW = Options(awq=Awq(grid=5, rows=1000, clip_steps=4))


def plan_of(bits: str, options: Options = FEW) -> QuantPlan:
    return QuantPlan(linear=SPECS[bits], head=None, options=options)


def stored(graph: GraphModule, site: str, spec: QuantSpec) -> Tensor:
    """The weight that the codes of a site stand for."""
    weights = attributes(graph)
    zero = weights.get(f"{site}.w_zero")
    return dequantize(weights[f"{site}.codes"], weights[f"{site}.w_scale"], spec.w_bits, spec.w_group, zero)


def output_error(rows: Tensor, change: Tensor) -> float:
    return float((rows.double() @ change.double().T).square().sum())


def textbook_scale(weight: Tensor, rows: Tensor, magnitude: Tensor, spec: QuantSpec) -> Tensor:
    requantize = format_of(spec.w_bits, spec.w_group, spec.w_symmetric)
    best, chosen = torch.inf, torch.ones(len(magnitude))
    for step in range(5):
        powers = magnitude ** (step / 5)
        scale = powers / (powers.max() * powers.min()).sqrt()
        error = output_error(rows, requantize(weight * scale, None) / scale - weight)
        if error < best:
            best, chosen = error, scale
    return chosen


def textbook_weight(weight: Tensor, rows: Tensor, spec: QuantSpec, free: Tensor) -> Tensor:
    """Clips searched row by row and group by group; rows that are not `free` keep theirs."""
    requantize, size = format_of(spec.w_bits, spec.w_group, spec.w_symmetric), spec.w_group or weight.shape[1]
    value = requantize(weight, None)
    for n in free.nonzero().flatten().tolist():
        for k in range(0, weight.shape[1], size):
            part = slice(k, k + size)
            best = torch.inf
            for ratio in (1.0, 0.75, 0.5):
                clip = torch.full((1, weight.shape[1] // size), ratio)
                tried = requantize(weight[n : n + 1], clip)[:, part]
                error = output_error(rows[:, part], tried - weight[n : n + 1, part])
                if error < best:
                    best, value[n, part] = error, tried[0]
    return value


@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("bits", ["w3a16", "w4a4"])
def test_weights_are_the_textbook_s(bits: str, kv_heads: int) -> None:
    spec, graph, given = SPECS[bits], block(kv_heads=kv_heads), samples()
    plain = copy_of(graph)
    run(graph, AWQ.passes(plan_of(bits), Fit(samples=given)), check_quantized)
    rows, weights = all_inputs(plain, given), attributes(plain)
    scales = {}
    for site in SITES:
        magnitude = rows[site].abs().mean(0)
        if site.endswith("o_proj"):
            magnitude = magnitude.reshape(kv_heads, -1, 8).mean(1, keepdim=True).expand(-1, 4 // kv_heads, -1).flatten()
        scales[site] = textbook_scale(weights[f"{site}.weight"], rows[site], magnitude, spec)
    FoldScale(scales.get)(plain)
    scaled, weights = all_inputs(plain, given), attributes(plain)
    for site in SITES:
        weight = weights[f"{site}.weight"]
        free = torch.ones(len(weight), dtype=torch.bool)
        if "q_k_v" in site:
            free[: 32 + 8 * kv_heads] = False
        wanted, found = textbook_weight(weight, scaled[site], spec, free), stored(graph, site, spec)
        # Weights are scaled in another order, so one next to a half may take the other code.
        assert ((found - wanted).abs() > 1e-4 * wanted.abs().max()).float().mean() <= 0.01, site


@pytest.mark.parametrize("bits", SPECS)
def test_rewriting_leaves_the_function(bits: str) -> None:
    graph, given = block(), samples()
    plain = copy_of(graph)
    assert run(graph, AWQ.rewrite(plan_of(bits), Fit(samples=given)), check_rewritten) == {"SearchScales": 4}
    for batch in given:
        wanted, found = plain(*batch.inputs), graph(*batch.inputs)
        assert (found - wanted)[batch.valid].abs().max() <= 1e-5 * wanted[batch.valid].abs().max()
    assert not all(torch.equal(value, attributes(plain)[name]) for name, value in attributes(graph).items())


# A clip is judged by its own group: only where that is the whole row is the sum known not to rise.
@pytest.mark.parametrize(("bits", "clip"), [*((bits, False) for bits in SPECS), ("w4a4", True), ("w8a8", True)])
def test_never_worse_than_rtn_in_its_own_objective(bits: str, clip: bool) -> None:
    spec, graph, given = SPECS[bits], block(), samples(loud=20.0)
    plain = copy_of(graph)
    plan = plan_of(bits, Options(awq=Awq(rows=1000, grid=8, clip=clip)))
    run(graph, AWQ.rewrite(plan, Fit(samples=given)), check_rewritten)
    scaled = copy_of(graph)
    run(graph, AWQ.solve(plan, Fit(samples=given)), check_quantized)
    rows, requantize = all_inputs(plain, given), format_of(spec.w_bits, spec.w_group, spec.w_symmetric)
    shares = []
    for site in SITES:
        weight, folded = (attributes(each)[f"{site}.weight"] for each in (plain, scaled))
        value = stored(graph, site, spec) * (weight / folded)  # back to the columns and rows that it had
        errors = [output_error(rows[site], each - weight) for each in (value, requantize(weight, None))]
        assert errors[0] <= errors[1] * (1 + 1e-4), site
        shares.append(errors[0] / errors[1])
    assert min(shares) < 0.7


def test_activations_are_rounded_in_integer_formats_only() -> None:
    for bits, rounded in {"w4a16": 0, "w4a4": 4}.items():
        graph = block()
        run(graph, AWQ.passes(plan_of(bits), Fit(samples=samples())), check_quantized)
        assert count(graph, ops.fake_quant.default) == rounded
        assert count(graph, ops.dequantize.default) == 4


@pytest.mark.parametrize("bits", ["w4a16", "w4a4"])
def test_shapes_alone_give_the_same_names(bits: str) -> None:
    config = replace(tiny(shifted=True).config, num_heads=4, num_kv_heads=2, head_dim=8)
    whole, piece = capture_whole(config, top_k=4), block()
    run(whole, AWQ.passes(plan_of(bits)), check_quantized)
    run(piece, AWQ.passes(plan_of(bits), Fit(samples=samples())), check_quantized)
    shapes = {name: value.shape for name, value in attributes(whole).items() if name.startswith("blocks.0.")}
    assert shapes == {name: value.shape for name, value in attributes(piece).items()}
    assert [site_of(node) for node in calls(whole, aten.linear.default)][:4] == list(SITES)


def test_no_samples_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="there are no samples"):
        run(block(), AWQ.passes(plan_of("w4a16")), check_quantized)


def test_skipped_sites_keep_their_weights() -> None:
    graph, given = block(), samples()
    before = attributes(graph)[f"{SITES[1]}.weight"]
    plan = replace(plan_of("w4a16"), skip=("*.o_proj",))
    run(graph, AWQ.rewrite(plan, Fit(samples=given)), check_rewritten)
    run(graph, AWQ.solve(plan, Fit(samples=given)), check_quantized)
    assert torch.equal(attributes(graph)[f"{SITES[1]}.weight"], before)
    assert count(graph, ops.dequantize.default) == 3
