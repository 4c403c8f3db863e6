"""FlatQuant and FreeAct on captured blocks: exact before rounding, and after it what was trained is what runs."""

from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from passes.base import run
from passes.fit import Batch, CalibrationError, Fit
from passes.graph import attribute, attributes, calls, int_of, node_of, site_of
from passes.invariants import check_quantized, check_rewritten
from passes.learned_transforms import START_CLIP
from passes.methods import METHODS
from passes.options import FlatQuant, FreeAct, Options
from passes.quant_spec import AttentionSpec, QuantPlan, QuantSpec
from passes.solvers.draws import generator
from passes.train_transforms import Simulated, TrainTransforms, train
from pipeline.capture import ENDS, capture_piece, capture_whole, pieces
from pipeline.models.config import ModelConfig
from pipeline.models.transformer import Transformer, rotary_angles, rotary_frequencies
from tests.passes.samples import Listed
from tests.passes.sketch import aten, copy_of, count, only, ops
from tests.pipeline.random_models import tiny

NAMES = ("flatquant", "freeact")
FAMILIES = ("llada", "dream")
PROJECTIONS = ("attn.q_k_v_proj", "attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
B, Q = 4, 7


@dataclass(frozen=True, kw_only=True)
class Case:
    """A block with random weights, samples of its inputs, and what it makes of them."""

    config: ModelConfig
    graph: GraphModule
    samples: Listed
    outputs: list[Tensor]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed, str(shape)))


@cache
def case(family: str) -> Case:
    dream = family == "dream"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        config = replace(tiny(shifted=dream).config, num_kv_heads=1 if dream else 2)
        weights = Transformer(config).state_dict()
    block = pieces(config)[1]
    graph = capture_piece(config, block, {name: 3 * weights[name] for name in block.weights})
    batches = []
    for number in range(2):
        lengths = torch.tensor([Q, Q - 1, Q, 3])
        valid = torch.arange(Q)[None, :] < lengths[:, None]
        masked = (drawn(B, Q, seed=number) > 0) & valid
        cos, sin = rotary_angles(torch.arange(Q).expand(B, Q), rotary_frequencies(config))
        visible = valid[:, None, None, :].expand(-1, 1, Q, -1)
        x = drawn(B, Q, 3, seed=number) @ drawn(3, config.hidden_size) + masked[..., None] * drawn(config.hidden_size)
        inputs = (x, cos, sin, visible, masked.int())
        batches.append(Batch(inputs=inputs, valid=valid, masked=masked, noise=torch.zeros(B), first=number * B))
    outputs = [graph(*batch.inputs) for batch in batches]
    return Case(config=config, graph=graph, samples=Listed(batches), outputs=outputs)


def plan_of(one: Case, *, weights: str = "rtn", bits: int = 4) -> QuantPlan:
    return QuantPlan(
        linear=QuantSpec(w_bits=bits, a_bits=bits),
        head=QuantSpec(w_bits=8, a_bits=8),
        options=Options(flatquant=FlatQuant(epochs=2, weights=weights), freeact=FreeAct(share=8)),  # type: ignore[arg-type]
        mask_id=one.config.mask_id,
    )


def error(one: Case, outputs: list[Tensor]) -> float:
    """Squared error relative to the squared size of the outputs, rows of padding apart."""
    rows = [
        (found - wanted)[batch.valid] for found, wanted, batch in zip(outputs, one.outputs, one.samples, strict=True)
    ]
    size = [wanted[batch.valid] for wanted, batch in zip(one.outputs, one.samples, strict=True)]
    return float(torch.cat(rows).square().sum() / torch.cat(size).square().sum())


def quantised(one: Case, name: str, plan: QuantPlan) -> tuple[GraphModule, Fit, list[Tensor]]:
    """The block through the whole method, and its outputs when it was only rewritten."""
    method, graph, fit = METHODS[name], copy_of(one.graph), Fit(samples=one.samples, seed=5)
    changed = run(graph, method.rewrite(plan, fit), check_rewritten)
    assert changed == {"TrainTransforms": 4, "FoldScale": 3, "InsertTransform": 4}
    rewritten = [graph(*batch.inputs) for batch in one.samples]
    run(graph, method.solving(plan, fit), check_quantized)
    run(graph, method.finishing(plan, fit), check_quantized)
    return graph, fit, rewritten


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", NAMES)
def test_what_was_trained_is_what_runs(name: str, family: str) -> None:
    one = case(family)
    plan = plan_of(one)
    graph, fit, rewritten = quantised(one, name, plan)
    for found, wanted in zip(rewritten, one.outputs, strict=True):
        assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    share = 8 if name == "freeact" else None
    sites = TrainTransforms(plan, fit, share=share).sites(one.graph, one.samples)
    values = train(one.graph, sites, one.samples, options=plan.options.flatquant, seed=5)
    with torch.no_grad():
        trained = [Simulated(one.graph, sites, values, batch).run(*batch.inputs) for batch in one.samples]
    outputs = [graph(*batch.inputs) for batch in one.samples]
    apart = error(replace(one, outputs=trained), outputs)
    # A code of 15 levels moves now and then, where sums of float32 and of float64 round to both sides of a half.
    assert apart <= 0.02 * error(one, outputs)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", NAMES)
def test_the_whole_graph_gets_what_the_block_stored(name: str, family: str) -> None:
    one = case(family)
    plan = plan_of(one)
    graph, fit, _ = quantised(one, name, plan)
    whole = capture_whole(one.config, top_k=4)
    run(whole, METHODS[name].passes(plan, Fit(seed=5, numbers=fit.numbers)), check_quantized)
    inside = {key: value.shape for key, value in attributes(whole).items() if key.startswith("blocks.0.")}
    assert inside == {key: value.shape for key, value in attributes(graph).items()}
    assert count(whole, ops.prepare.default) == 8
    prepared = {site_of(linear): linear for linear in calls(graph, aten.linear.default)}
    assert set(prepared) == {f"blocks.0.{site}" for site in PROJECTIONS}
    for linear in calls(whole, aten.linear.default):
        if site_of(linear) not in prepared:
            continue
        ours, theirs = (node_of(node.args[0]) for node in (prepared[site_of(linear)], linear))
        assert ours.args[1:] == theirs.args[1:]  # bits and clip ratios
        assert node_of(ours.args[0]).args[8:] == node_of(theirs.args[0]).args[8:]  # the gate
        assert 0.5 < ours.args[-1] < 0.99  # type: ignore[operator]
        state = node_of(theirs.args[0]).args[7]
        assert (state is None) == (name == "flatquant")
    if name == "freeact":
        comparison = only(whole, aten.eq.Scalar)
        assert comparison.args[1] == one.config.mask_id
        assert {node_of(node.args[7]).target for node in calls(graph, ops.prepare.default)} == {"state"}


def test_heads_are_a_factor_behind_attention() -> None:
    one = case("dream")
    graph, _, _ = quantised(one, "flatquant", plan_of(one))
    left = attributes(graph)["blocks.0.attn.o_proj.left"]
    right = attributes(graph)["blocks.0.attn.o_proj.right"]
    assert (len(left), len(right)) == (one.config.num_heads, one.config.head_dim)
    assert len(attributes(graph)["blocks.0.mlp.down_proj.left"]) == 6  # 48 = 6 x 8


def test_a_state_keeps_the_share_of_each_input_that_was_asked_for() -> None:
    one = case("llada")
    plan = plan_of(one)
    plan = replace(plan, options=replace(plan.options, freeact=FreeAct(share=16)))
    graph, _, _ = quantised(one, "freeact", plan)
    for node in calls(graph, ops.prepare.default):
        sizes = [len(attribute(graph, node_of(node.args[place]))) for place in (5, 6)]
        axis, size = map(int_of, node.args[9:])
        assert 16 * size * sizes[1 - axis] == sizes[0] * sizes[1]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", NAMES)
def test_keys_and_values_that_are_rounded_are_rotated(name: str, family: str) -> None:
    one = case(family)
    plan = replace(plan_of(one), attention=AttentionSpec(k_bits=4, v_bits=4))
    plan = replace(plan, options=replace(plan.options, flatquant=FlatQuant(epochs=1)))
    graph, fit = copy_of(one.graph), Fit(samples=one.samples, seed=5)
    changed = run(graph, METHODS[name].rewrite(plan, fit), check_rewritten)
    assert (changed["RotateValues"], changed["RotateKeys"]) == (1, 1)
    assert (count(graph, ops.rotate.default), count(graph, ops.prepare.default)) == (2, 4)
    for batch, wanted in zip(one.samples, one.outputs, strict=True):
        assert (graph(*batch.inputs) - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    run(graph, [*METHODS[name].solving(plan, fit), *METHODS[name].finishing(plan, fit)], check_quantized)
    whole = capture_whole(one.config, top_k=4)
    run(whole, METHODS[name].passes(plan, Fit(seed=5, numbers=fit.numbers)), check_quantized)
    inside = {key: value.shape for key, value in attributes(whole).items() if key.startswith("blocks.0.")}
    assert inside == {key: value.shape for key, value in attributes(graph).items()}


def test_clips_of_rate_zero_stay_where_they_start() -> None:
    one = case("llada")
    plan, fit = plan_of(one), Fit(samples=one.samples)
    sites = TrainTransforms(plan, fit).sites(one.graph, one.samples)
    options = FlatQuant(epochs=2, clip_rate=0)
    start = torch.sigmoid(torch.tensor(START_CLIP))
    for found in train(one.graph, sites, one.samples, options=options, seed=5).values():
        for clip in (found.clip_lo, found.clip_hi, found.w_clip):
            assert bool((clip == start).all())


def test_what_the_last_step_breaks_is_refused() -> None:
    one = case("llada")
    first = Listed(list(one.samples)[:1])
    sites = TrainTransforms(plan_of(one), Fit(samples=first)).sites(one.graph, first)
    with pytest.raises(
        CalibrationError, match=r"learned for blocks\.0\.attn\.q_k_v_proj is not finite.*flatquant\.rate"
    ):
        train(one.graph, sites, first, options=FlatQuant(rate=1e30, epochs=1), seed=5)


def test_weights_by_gptq_saturate_as_learned() -> None:
    one = case("llada")
    nearest, fit, _ = quantised(one, "flatquant", plan_of(one))
    solved, again, _ = quantised(one, "flatquant", plan_of(one, weights="gptq"))
    assert fit.numbers == again.numbers
    before, after = attributes(nearest), attributes(solved)
    for site in (f"blocks.0.{each}" for each in PROJECTIONS):
        assert not torch.equal(before[f"{site}.codes"], after[f"{site}.codes"])
        assert torch.equal(before[f"{site}.w_scale"], after[f"{site}.w_scale"])


@pytest.mark.parametrize("name", NAMES)
def test_the_ends_and_skipped_linears_are_left_alone(name: str) -> None:
    one = case("llada")
    with torch.device("meta"):
        weights = Transformer(one.config).state_dict()
    first = pieces(one.config)[0]
    assert first.name == ENDS
    ends = capture_piece(one.config, first, {key: torch.ones(weights[key].shape) for key in first.weights})
    assert sum(run(ends, METHODS[name].rewrite(plan_of(one), Fit(samples=one.samples)), check_rewritten).values()) == 0
    plan, graph = replace(plan_of(one), skip=("*.o_proj", "*.down_proj")), copy_of(one.graph)
    fit = Fit(samples=one.samples)
    assert run(graph, METHODS[name].rewrite(plan, fit), check_rewritten)["InsertTransform"] == 2
    for site in ("blocks.0.attn.o_proj", "blocks.0.mlp.down_proj"):
        (linear,) = (node for node in calls(graph, aten.linear.default) if site_of(node) == site)
        assert torch.equal(attribute(graph, node_of(linear.args[1])), attributes(one.graph)[f"{site}.weight"])
