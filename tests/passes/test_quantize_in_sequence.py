"""Weights solved one after another: each by the Hessian behind those before it, none left out."""

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from passes.base import PassError, run
from passes.fit import CalibrationError, Fit
from passes.graph import attributes, calls, site_of
from passes.hessians import hessian
from passes.invariants import check_quantized
from passes.methods.gptq import METHOD
from passes.options import Gptq, Options
from passes.quant_spec import QuantPlan, QuantSpec
from passes.quantize_in_sequence import QuantizeInSequence
from passes.quantize_weights import QuantizeWeights, nearest
from passes.solvers.gptq import SingularHessianError, gptq
from passes.solvers.grid import Grid
from tests.passes.blocks import SITES, block, samples
from tests.passes.conftest import Whole
from tests.passes.sketch import aten, copy_of, edited
from tests.passes.test_hessians import linear_at

FORMS = [
    QuantSpec(w_bits=4, w_group=16, w_symmetric=False),
    QuantSpec(w_bits=3, w_group=8),
    QuantSpec(w_bits=4, a_bits=4),
    QuantSpec(w_bits=8, a_bits=8),
]


def plan_of(spec: QuantSpec, *skip: str, act_order: bool = False) -> QuantPlan:
    return QuantPlan(linear=spec, head=None, skip=skip, options=Options(gptq=Gptq(act_order=act_order)))


def rounded(weight: Tensor, moments: Tensor, spec: QuantSpec) -> Grid:
    return nearest("", weight, spec)


def test_each_hessian_is_that_behind_the_weights_before_it() -> None:
    torch.manual_seed(2)
    graph, batches, seen = block(), samples(), []

    def note(weight: Tensor, moments: Tensor, spec: QuantSpec) -> Grid:
        seen.append(moments)
        return nearest("", weight, spec)

    plan = plan_of(QuantSpec(w_bits=3))
    done, counts = edited(graph, QuantizeInSequence(plan, batches, note))
    assert counts == [4]
    for index, site in enumerate(SITES):
        before = copy_of(graph)
        QuantizeWeights(plan_of(QuantSpec(w_bits=3), *SITES[index:]), nearest)(before)
        assert torch.equal(seen[index], hessian(before, linear_at(before, site), batches)), site
    together, _ = edited(graph, QuantizeWeights(plan, nearest))
    assert str(done.graph) == str(together.graph)
    assert all(torch.equal(value, attributes(together)[name]) for name, value in attributes(done).items())


def test_float_weights_go_as_soon_as_codes_are_there() -> None:
    graph, left = block(), []

    def note(weight: Tensor, moments: Tensor, spec: QuantSpec) -> Grid:
        left.append(sum(name.endswith("proj.weight") for name in attributes(graph)))
        return nearest("", weight, spec)

    QuantizeInSequence(plan_of(QuantSpec(w_bits=4)), samples(2), note)(graph)
    assert left == [4, 3, 2, 1]
    assert not any(name.endswith("proj.weight") for name, _ in graph.named_buffers())


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("spec", FORMS)
def test_output_error_is_below_that_of_nearest_on_every_linear(spec: QuantSpec, act_order: bool) -> None:
    torch.manual_seed(4)
    graph, batches = block(kv_heads=2), samples(8)
    plan = plan_of(spec, act_order=act_order)
    done = copy_of(graph)
    changed = run(done, METHOD.solve(plan, Fit(samples=batches)), check_quantized)
    assert changed == {"QuantizeInSequence": 4}
    rtn = copy_of(graph)
    run(rtn, [QuantizeWeights(plan, nearest)], check_quantized)
    for index, site in enumerate(SITES):
        before = copy_of(graph)  # its input, behind the weights that the method had solved
        replace_weights(before, done, SITES[:index])
        moments = hessian(before, linear_at(before, site), batches).double()
        weight = attributes(graph)[f"{site}.weight"].double()
        errors = [
            float(((change @ moments) * change).sum()) for change in (stored(g, site) - weight for g in (done, rtn))
        ]
        assert errors[0] < errors[1], (site, errors)


def stored(graph: GraphModule, site: str) -> Tensor:
    """What the linear at `site` computes with, float64."""
    weight = linear_at(graph, site).args[1]
    values = torch.fx.Interpreter(graph)
    arguments = [values.fetch_attr(a.target) if isinstance(a, torch.fx.Node) else a for a in weight.args]
    result: Tensor = torch.ops.dllmc.dequantize(*arguments)
    return result.double()


def replace_weights(graph: GraphModule, source: GraphModule, sites: tuple[str, ...]) -> None:
    for site in sites:
        attributes(graph)[f"{site}.weight"].data.copy_(stored(source, site))


def test_codes_are_those_of_the_solver() -> None:
    graph, batches = block(), samples()
    spec = QuantSpec(w_bits=4, w_group=8, w_symmetric=False)
    done = copy_of(graph)
    run(done, METHOD.solve(plan_of(spec), Fit(samples=batches)), check_quantized)
    moments = hessian(graph, linear_at(graph, SITES[0]), batches)
    expected = gptq(
        attributes(graph)[f"{SITES[0]}.weight"], moments, bits=4, group=8, symmetric=False, damping=0.01, block=128
    )
    for leaf, value in (("codes", expected.codes), ("w_scale", expected.scale), ("w_zero", expected.zero)):
        assert torch.equal(attributes(done)[f"{SITES[0]}.{leaf}"], value)


@pytest.mark.parametrize("spec", FORMS)
def test_shapes_alone_give_the_same_names_and_shapes(whole: Whole, spec: QuantSpec) -> None:
    plan = QuantPlan(linear=spec, head=QuantSpec(w_bits=8, a_bits=8))
    graph = whole("dream").to("meta")
    run(graph, METHOD.passes(plan), check_quantized)
    piece = block(kv_heads=2)
    run(piece, METHOD.solve(plan, Fit(samples=samples(2))), check_quantized)
    assert sum(name.endswith(".codes") for name in attributes(graph)) == 9
    leaves = {"codes", "w_scale"} | ({"w_zero"} if not spec.w_symmetric else set())
    for site in SITES:
        for found in (graph, piece):
            names = {name for name in attributes(found) if name.startswith(site) and not name.endswith("bias")}
            assert names == {f"{site}.{leaf}" for leaf in leaves}
    down = f"{SITES[3]}.w_scale"
    assert attributes(graph)[down].shape == attributes(piece)[down].shape


def test_skipped_linears_stay_and_are_not_counted() -> None:
    graph = block()
    changed = run(
        graph,
        [QuantizeInSequence(plan_of(QuantSpec(w_bits=4), "*.o_proj"), samples(2), rounded)],
        check_quantized,
    )
    assert changed == {"QuantizeInSequence": 3}
    assert [site_of(linear) for linear in calls(graph, aten.linear.default)] == list(SITES)
    assert f"{SITES[1]}.weight" in attributes(graph)


def test_a_singular_hessian_is_named_by_its_site() -> None:
    def refuse(weight: Tensor, moments: Tensor, spec: QuantSpec) -> Grid:
        raise SingularHessianError("no factor")

    with pytest.raises(PassError) as raised:
        run(block(), [QuantizeInSequence(plan_of(QuantSpec(w_bits=4)), samples(2), refuse)], check_quantized)
    assert isinstance(raised.value.__cause__, CalibrationError)
    assert str(raised.value.__cause__) == f"inputs of {SITES[0]} leave nothing to solve by: no factor"


def test_weights_without_samples_are_not_rounded_in_silence() -> None:
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.q_k_v_proj cannot be solved without samples"):
        edited(block(), QuantizeInSequence(plan_of(QuantSpec(w_bits=4)), None, rounded))
