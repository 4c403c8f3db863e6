"""Balanced blocks compute what they did, by scales and head matrices that rows written out give, with less noise."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from passes.balance_channels import BalanceChannels, second_moments
from passes.base import run
from passes.fit import CalibrationError, Fit
from passes.graph import attributes
from passes.invariants import check_float
from passes.quant_spec import QuantPlan, QuantSpec
from passes.solvers.balance import channel_scale, head_transform
from tests.passes.blocks import SITES, block, samples
from tests.passes.conftest import Whole
from tests.passes.rewrites import on_shapes
from tests.passes.samples import Listed
from tests.passes.sketch import assert_untouched, copy_of
from tests.passes.test_magnitudes import all_inputs

PLAN = QuantPlan(linear=QuantSpec(w_bits=4, a_bits=4), head=None)
HEAD = 8
KV_HEADS = pytest.mark.parametrize("kv_heads", [1, 2, 4])


def balanced(graph: GraphModule, given: Listed, plan: QuantPlan = PLAN) -> GraphModule:
    made = copy_of(graph)
    run(made, [BalanceChannels(plan, Fit(samples=given))], check_float)
    return made


def weight(graph: GraphModule, site: str) -> Tensor:
    return attributes(graph)[f"{site}.weight"].double()


@pytest.mark.parametrize(("kv_heads", "bias"), [(1, True), (2, False), (2, True), (4, False)])
def test_the_function_stays(kv_heads: int, bias: bool) -> None:
    graph, given = block(kv_heads=kv_heads, bias=bias), samples(batch=3)
    made = copy_of(graph)
    changed = run(made, [BalanceChannels(PLAN, Fit(samples=given))], check_float)
    assert changed == {"BalanceChannels": 4}
    assert str(made.graph) == str(graph.graph)
    for batch in given:
        wanted, found = graph(*batch.inputs), made(*batch.inputs)
        assert (found - wanted)[batch.valid].abs().max() <= 1e-5 * wanted[batch.valid].abs().max()


@KV_HEADS
def test_scales_are_the_formula_s(kv_heads: int) -> None:
    graph, given = block(kv_heads=kv_heads), samples()
    made, rows = balanced(graph, given), all_inputs(graph, given)
    expected = {}
    for site in (SITES[0], SITES[2], SITES[3]):
        x, w = rows[site].double().square().sum(0), weight(graph, site).square().sum(0)
        expected[site] = channel_scale(x, w)  # channels are multiplied by it, columns divided
    gains = ["blocks.0.attn_norm.weight", "blocks.0.mlp_norm.weight"]
    for gain, site in zip(gains, (SITES[0], SITES[2]), strict=True):
        ratio = attributes(made)[gain].double() / attributes(graph)[gain].double()
        assert torch.allclose(ratio, expected[site], rtol=1e-5)
    assert torch.allclose(weight(graph, SITES[3]) / weight(made, SITES[3]), expected[SITES[3]], rtol=1e-5)
    up, plain = weight(made, SITES[2])[1::2], weight(graph, SITES[2])[1::2]
    ratio = up * expected[SITES[2]] / plain
    assert torch.allclose(ratio, expected[SITES[3]][:, None].expand_as(ratio), rtol=1e-5)


@KV_HEADS
def test_matrices_are_those_of_the_heads_that_share_values(kv_heads: int) -> None:
    graph, given = block(kv_heads=kv_heads), samples()
    made, rows = balanced(graph, given), all_inputs(graph, given)[SITES[1]].double()
    plain, after = weight(graph, SITES[1]), weight(made, SITES[1])
    repeats = 4 // kv_heads
    for group in range(kv_heads):
        heads = [slice(h * HEAD, (h + 1) * HEAD) for h in range(group * repeats, (group + 1) * repeats)]
        moments = sum((rows[:, head].T @ rows[:, head] for head in heads), torch.zeros(HEAD, HEAD).double())
        gram = sum((plain[:, head].T @ plain[:, head] for head in heads), torch.zeros(HEAD, HEAD).double())
        fold = head_transform(moments, gram)
        for head in heads:
            wanted = plain[:, head] @ torch.linalg.inv(fold).T
            assert (after[:, head] - wanted).abs().max() <= 1e-5 * wanted.abs().max()
        own = slice(32 + kv_heads * HEAD + group * HEAD, 32 + kv_heads * HEAD + (group + 1) * HEAD)
        bias = (attributes(each)[f"{SITES[0]}.bias"][own].double() for each in (graph, made))
        wanted, found = next(bias) @ fold, next(bias)
        assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("seed", range(3))
def test_rounding_makes_less_noise_at_every_site(seed: int) -> None:
    torch.manual_seed(seed)
    graph, given = block(), samples(loud=20.0)
    made = balanced(graph, given)
    noise = []
    for each in (graph, made):
        rows = all_inputs(each, given)
        # Weights by what they would be without the rows that other sites scale.
        noise.append({site: float(rows[site].square().sum() * weight(each, site).square().sum()) for site in SITES})
    for site in SITES[1::2]:
        assert noise[1][site] < noise[0][site], site


def test_moments_are_the_same_for_any_batches() -> None:
    graph, sizes = block(), {SITES[0]: 1, SITES[1]: HEAD}
    torch.manual_seed(3)
    one = second_moments(graph, samples(batch=6), sizes)
    torch.manual_seed(3)
    other = second_moments(graph, samples(batch=1), sizes)
    assert {site: tuple(each.shape) for site, each in one.items()} == {SITES[0]: (32, 1, 1), SITES[1]: (4, 8, 8)}
    assert all((one[site] - other[site]).abs().max() <= 1e-6 * one[site].abs().max() for site in sizes)


def test_shapes_alone_and_floats_stay(whole: Whole) -> None:
    assert_untouched(on_shapes(whole("dream")), BalanceChannels(replace(PLAN, head=PLAN.linear), Fit()))
    assert_untouched(block(), BalanceChannels(replace(PLAN, linear=None), Fit()))
    with pytest.raises(ValueError, match="there are no samples"):
        BalanceChannels(PLAN, Fit())(block())


@pytest.mark.parametrize(("skip", "count"), [(("*.o_proj",), 3), (("*.mlp.*", "*.q_k_v_proj"), 1)])
def test_sites_at_16_bits_are_left_alone(skip: tuple[str, ...], count: int) -> None:
    graph, given = block(), samples()
    made = copy_of(graph)
    assert BalanceChannels(replace(PLAN, skip=skip), Fit(samples=given))(made) == count
    if count == 3:
        assert torch.equal(weight(made, SITES[1]), weight(graph, SITES[1]))
    wanted, found = (each(*given.batches[0].inputs) for each in (graph, made))
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_an_input_that_is_not_finite_is_named_and_nothing_is_written() -> None:
    graph, given = block(), samples()
    given.batches[1].inputs[0][1, 0, 3] = torch.nan
    before = dict(attributes(graph))
    with pytest.raises(CalibrationError, match=rf"^the input of {SITES[0]} has .* not finite in .* sample 3;"):
        BalanceChannels(PLAN, Fit(samples=given))(graph)
    assert attributes(graph) == before
