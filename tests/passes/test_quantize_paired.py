"""Weights solved towards the float result: each step written out row by row, and what pairing is good for."""

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from passes import hessians
from passes.base import PassError, run
from passes.fit import Batch, CalibrationError, Fit
from passes.gate_transforms import GateTransforms
from passes.graph import add_attribute, attributes, calls, node_of, site_of, twin_of
from passes.insert_fake_quant import InsertFakeQuant
from passes.insert_tac import attention_outputs
from passes.insert_transform import InsertTransform, Transform
from passes.invariants import check_quantized, check_rewritten
from passes.methods.gptq import gptq_solver, solve_by_gptq
from passes.quant_spec import AttentionSpec, QuantPlan, QuantSpec
from passes.quantize_paired import RIDGE, QuantizePaired
from passes.quantize_weights import nearest
from passes.solvers.draws import generator
from passes.solvers.gptq import SingularHessianError
from passes.solvers.grid import Grid
from passes.solvers.hadamard import rotation
from plugins.prepare import PREPARE
from tests.passes.blocks import SITES, block, samples
from tests.passes.conftest import Whole
from tests.passes.lockstep import Values
from tests.passes.rewrites import on_shapes
from tests.passes.samples import Listed
from tests.passes.sketch import aten, copy_of, count, ops
from tests.passes.test_hessians import linear_at
from tests.passes.test_paired import textbook
from tests.passes.test_quantize_in_sequence import stored

PLAN = QuantPlan(linear=QuantSpec(w_bits=4, a_bits=4, symmetric=False), head=None)


@dataclass
class Noted:
    """A solver that rounds to nearest and keeps what it was given."""

    weights: list[Tensor] = field(default_factory=list)
    hessians: list[Tensor] = field(default_factory=list)

    def __call__(self, weight: Tensor, hessian: Tensor, spec: QuantSpec) -> Grid:
        self.weights.append(weight)
        self.hessians.append(hessian)
        return nearest("", weight, spec)


def disturbed(given: Listed, size: float) -> Listed:
    """The same canvases as quantised blocks before might give them; every other row is masked."""
    draw, batches = generator(given.batches[0].first, "disturbed"), []
    for batch in given:
        x, *rest, state = batch.inputs
        state = (torch.arange(x.shape[1]) % 2).int().expand(x.shape[:2])
        x = 0.9 * x + size * torch.randn(x.shape, generator=draw)
        batches.append(replace(batch, inputs=(x, *rest, state), masked=state == 1))
    return Listed(batches)


def related(given: Listed, seed: int) -> Listed:
    """Rows with eight directions in common and little noise: what errs in one channel shows in others."""
    draw, batches = generator(seed, "related"), []
    mix = torch.randn(8, 32, generator=draw) / 8**0.5
    for batch in given:
        shape = batch.valid.shape
        x = torch.randn(*shape, 8, generator=draw) @ mix + 0.1 * torch.randn(*shape, 32, generator=draw)
        batches.append(replace(batch, inputs=(x, *batch.inputs[1:])))
    return Listed(batches)


def paired_fit(graph: GraphModule, given: Listed, size: float = 0.3) -> Fit:
    return Fit(samples=given, quantized=disturbed(given, size), reference=twin_of(graph))


def error(graph: GraphModule, fit: Fit) -> float:
    """Squared error of the block's output against the float one's, relative."""
    assert fit.samples is not None and fit.quantized is not None and fit.reference is not None
    wrong, whole = 0.0, 0.0
    for one, other in zip(fit.samples, fit.quantized, strict=True):
        wanted = fit.reference(*one.inputs)[one.valid]
        wrong += float((graph(*other.inputs)[other.valid] - wanted).square().sum())
        whole += float(wanted.square().sum())
    return wrong / whole


def values_at(graph: GraphModule, batch: Batch, site: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rows that count of a linear's input and output, and of the stream that it is added to."""
    seen, linear = Values(graph), linear_at(graph, site)
    seen.run(*batch.inputs)
    adds = [user for user in linear.users if user.target is aten.add.Tensor]
    others = [seen.values[node_of(each)] for add in adds for each in add.args if each is not linear]
    x, y = seen.values[node_of(linear.args[0])], seen.values[linear]
    return x[batch.valid], y[batch.valid], others[0][batch.valid] if others else None


@pytest.mark.parametrize(("kv_heads", "strip"), [(1, 1024), (2, 10)])
def test_each_weight_is_the_textbook_s(kv_heads: int, strip: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hessians, "STRIP", strip)
    graph, noted = block(kv_heads=kv_heads), Noted()
    fit, given = paired_fit(graph, samples()), attributes(graph)
    done = copy_of(graph)
    assert run(done, [QuantizePaired(PLAN, fit, noted)], check_quantized) == {"QuantizePaired": 4}
    assert fit.samples is not None and fit.quantized is not None
    for index, site in enumerate(SITES):
        xs, ys = [], []
        for one, other in zip(fit.samples, fit.quantized, strict=True):
            # Only what stands before a linear reaches it, so the block that is done shows what was there.
            x, _, stream = values_at(done, other, site)
            _, wanted, float_stream = values_at(graph, one, site)
            if stream is not None and float_stream is not None:
                wanted = wanted.double() + float_stream.double() - stream.double()
            xs.append(x.double())
            ys.append(wanted.double() - given.get(f"{site}.bias", torch.zeros(1)).double())
        x, y = torch.cat(xs), torch.cat(ys)
        weight = given[f"{site}.weight"].double()
        expected = torch.from_numpy(textbook(weight.numpy(), x.numpy(), y.numpy(), RIDGE))
        assert (noted.weights[index].double() - expected).abs().max() <= 1e-4 * expected.abs().max(), site
        moments = x.T @ x
        assert (noted.hessians[index] - moments).abs().max() <= 1e-5 * moments.abs().max(), site
        assert noted.hessians[index].dtype == torch.float32
        assert np.abs(expected.numpy() - weight.numpy()).max() >= 1e-2  # there is something to make up for


def test_exact_quantisers_leave_the_weights() -> None:
    plan = replace(PLAN, linear=QuantSpec(w_bits=4))
    graph, noted, given = block(), Noted(), samples()
    on_grid = copy_of(graph)
    for site in SITES:
        value = attributes(graph)[f"{site}.weight"]
        grid = nearest(site, value, QuantSpec(w_bits=4))
        attributes(on_grid)[f"{site}.weight"].copy_(grid.codes * grid.scale)
    before = {site: attributes(on_grid)[f"{site}.weight"].clone() for site in SITES}
    fit, done = Fit(samples=given, quantized=given, reference=twin_of(on_grid)), copy_of(on_grid)
    run(done, [QuantizePaired(plan, fit, noted)], check_quantized)
    for site, found in zip(SITES, noted.weights, strict=True):
        assert (found - before[site]).abs().max() <= 1e-5 * before[site].abs().max(), site
        assert (stored(done, site) - before[site]).abs().max() <= 1e-5 * before[site].abs().max(), site
    assert error(done, fit) <= 1e-10


@pytest.mark.parametrize("bits", [(4, 4), (8, 8)], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_blocks_err_less_than_with_plain_gptq(seed: int, bits: tuple[int, int]) -> None:
    """On canvases that were not learned from."""
    torch.manual_seed(seed)
    graph, given = block(kv_heads=1 + seed % 2), related(samples(96, batch=16), seed).batches
    plan = replace(PLAN, linear=QuantSpec(w_bits=bits[0], a_bits=bits[1], symmetric=False))
    fit, held_out = (paired_fit(graph, Listed(part), size=0.1) for part in (given[:5], given[5:]))
    paired, plain = copy_of(graph), copy_of(graph)
    run(paired, [QuantizePaired(plan, fit, gptq_solver(plan, clip=True))], check_quantized)
    run(plain, [*solve_by_gptq(plan, fit, clip=True), InsertFakeQuant(plan)], check_quantized)
    assert error(paired, held_out) <= 0.85 * error(plain, held_out)


def test_gates_stand_before_what_is_solved() -> None:
    """What a gate leaves out is part of what is made up for."""
    graph, noted = block(), Noted()
    turned(graph)
    fit, done = paired_fit(graph, samples(), size=0.0), copy_of(graph)
    run(done, [GateTransforms(8, 0), QuantizePaired(PLAN, fit, noted)], check_quantized)
    assert fit.quantized is not None
    batch = next(iter(fit.quantized))
    for site in SITES[:3]:
        x, *_ = values_at(done, batch, site)
        silent = [int((x[batch.masked[batch.valid] == state] == 0).all(0).sum()) for state in (False, True)]
        assert silent == [4, 4], site
    ungated = Noted()
    run(copy_of(graph), [QuantizePaired(PLAN, fit, ungated)], check_quantized)
    assert not torch.equal(noted.weights[0], ungated.weights[0])


def turned(graph: GraphModule) -> None:
    """Every linear of width 32 behind a transform."""
    left, right = (rotation(size, generator(0, str(size))).float() for size in (4, 8))
    transforms = {site: Transform(left=left, right=right) for site in SITES[:3]}
    run(graph, [InsertTransform(transforms.get)], check_rewritten)


def test_corrections_come_before_the_linear_that_reads_them() -> None:
    graph, noted, seen = block(), Noted(), []
    turned(graph)
    plan = replace(PLAN, attention=AttentionSpec(prob_bits=4))
    fit, done, alone = paired_fit(graph, samples(2)), copy_of(graph), on_shapes(graph)

    def halve(each: GraphModule) -> int:
        seen.append([f"{site}.codes" in attributes(each) for site in SITES])
        ((site, node),) = attention_outputs(each).items()
        given, device = PREPARE.arguments(*node.args), attributes(each)[f"{site}.left"].device
        with each.graph.inserting_before(node):
            given["tac_matrix"] = add_attribute(
                each, f"{site}.tac_matrix", torch.eye(16, device=device).repeat(2, 1, 1) / 2
            )
            given["tac_bias"] = add_attribute(each, f"{site}.tac_bias", torch.ones(32, device=device))
        node.args = tuple(given.values())
        return 1

    run(done, [QuantizePaired(plan, fit, noted, correct=[halve])], check_quantized)
    assert fit.quantized is not None
    x = torch.cat([values_at(done, batch, SITES[1])[0] for batch in fit.quantized]).double()
    assert (noted.hessians[1] - x.T @ x).abs().max() <= 1e-5 * float((x.T @ x).abs().max())
    run(alone, [QuantizePaired(plan, Fit(), Noted(), correct=[halve])], check_quantized)
    assert seen == 2 * [[True, False, False, False]]
    assert str(alone.graph) == str(done.graph)
    assert list(attributes(alone)) == list(attributes(done))


def test_activations_and_attention_are_rounded_first_and_once() -> None:
    plan = replace(PLAN, attention=AttentionSpec(v_bits=4, prob_bits=4))
    graph, given, made = block(), samples(2), []
    for before in ([], [InsertFakeQuant(plan)]):
        done = copy_of(graph)
        for each in before:
            each(done)
        run(done, [QuantizePaired(plan, paired_fit(graph, given), Noted()), InsertFakeQuant(plan)], check_quantized)
        made.append(done)
        assert count(done, ops.fake_quant.default) == 4
        assert count(done, aten.scaled_dot_product_attention.default) == 0
    assert str(made[0].graph) == str(made[1].graph)
    one, other = map(attributes, made)
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_shapes_alone_give_the_same_names_and_shapes(whole: Whole) -> None:
    graph, piece = whole("dream").to("meta"), block(kv_heads=2)
    run(graph, [QuantizePaired(PLAN, Fit(), Noted())], check_quantized)
    fit = paired_fit(piece, samples(2))
    alone = on_shapes(piece)
    run(piece, [QuantizePaired(PLAN, fit, Noted())], check_quantized)
    run(alone, [QuantizePaired(PLAN, Fit(), Noted())], check_quantized)
    assert sum(name.endswith(".codes") for name in attributes(graph)) == 8  # the head is left alone
    assert str(alone.graph) == str(piece.graph)
    described = [{name: (v.shape, v.dtype) for name, v in attributes(each).items()} for each in (alone, piece)]
    assert described[0] == described[1]


def test_float_weights_go_and_the_reference_keeps_its_own() -> None:
    graph, left = block(), []
    fit = paired_fit(graph, samples(2))
    assert fit.reference is not None
    before = dict(attributes(fit.reference))

    def note(weight: Tensor, hessian: Tensor, spec: QuantSpec) -> Grid:
        left.append(sum(name.endswith("proj.weight") for name in attributes(graph)))
        return nearest("", weight, spec)

    QuantizePaired(PLAN, fit, note)(graph)
    assert left == [4, 3, 2, 1]
    assert attributes(fit.reference) == before


def test_batches_may_be_of_any_size() -> None:
    graph, found = block(), []
    for batch in (1, 6):
        torch.manual_seed(5)
        given = samples(batch=batch)
        fit, noted = Fit(samples=given, quantized=given, reference=twin_of(graph)), Noted()
        QuantizePaired(PLAN, fit, noted)(copy_of(graph))
        found.append(noted)
    one, other = (noted.weights[0] for noted in found)
    assert (one - other).abs().max() <= 1e-5 * one.abs().max()


def test_skipped_linears_stay_and_are_not_counted() -> None:
    plan = replace(PLAN, skip=("*.o_proj",))
    graph = block()
    changed = run(graph, [QuantizePaired(plan, paired_fit(graph, samples(2)), Noted())], check_quantized)
    assert changed == {"QuantizePaired": 3}
    assert [site_of(linear) for linear in calls(graph, aten.linear.default)] == list(SITES)
    assert f"{SITES[1]}.weight" in attributes(graph)


def test_what_is_missing_is_refused() -> None:
    graph, given = block(), samples(2)
    whole = paired_fit(graph, given)
    for fit in (Fit(), Fit(samples=given), replace(whole, reference=None), replace(whole, samples=None)):
        with pytest.raises(ValueError, match=r"blocks\.0\.attn\.q_k_v_proj cannot be solved without its float block"):
            QuantizePaired(PLAN, fit, Noted())(copy_of(graph))
    uneven = replace(whole, quantized=disturbed(Listed([*given.batches, *given.batches]), 0.1))
    with pytest.raises(ValueError, match="shorter than"):
        QuantizePaired(PLAN, uneven, Noted())(copy_of(graph))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("stream", ["quantised", "float"])
def test_what_is_not_finite_is_named_by_site_and_samples(stream: str, value: float) -> None:
    graph, fit = block(), paired_fit(block(), samples(6))
    graph = copy_of(graph)
    given = fit.quantized if stream == "quantised" else fit.samples
    assert isinstance(given, Listed)
    given.batches[1].inputs[0][1, 0, 3] = value
    where = {
        "quantised": rf"^the quantised input of {SITES[0]} has .* not finite in calibration sample 3;",
        "float": rf"^the float output of {SITES[0]} has .* not finite in calibration samples 2 to 3;",
    }
    with pytest.raises(CalibrationError, match=where[stream]):
        QuantizePaired(PLAN, fit, Noted())(graph)


def test_a_singular_hessian_is_named_by_its_site() -> None:
    def refuse(weight: Tensor, hessian: Tensor, spec: QuantSpec) -> Grid:
        raise SingularHessianError("no factor")

    graph = block()
    with pytest.raises(PassError) as raised:
        run(graph, [QuantizePaired(PLAN, paired_fit(graph, samples(2)), refuse)], check_quantized)
    assert isinstance(raised.value.__cause__, CalibrationError)
    assert str(raised.value.__cause__) == f"inputs of {SITES[0]} leave nothing to solve by: no factor"


def test_padding_may_hold_anything() -> None:
    graph, found = block(), []
    fit = paired_fit(graph, samples(2))
    for junk in (0.0, 50.0):
        assert isinstance(fit.samples, Listed) and isinstance(fit.quantized, Listed)
        for given in (fit.samples, fit.quantized):
            given.batches[0].inputs[0][1, -2:] += junk
        noted = Noted()
        QuantizePaired(PLAN, fit, noted)(copy_of(graph))
        found.append(noted.weights)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_the_stream_may_be_either_operand() -> None:
    graph, found = block(), []
    fit = paired_fit(graph, samples(2))
    for swapped in (False, True):
        noted, done = Noted(), copy_of(graph)
        for site in (SITES[1], SITES[3]) if swapped else ():
            (add,) = linear_at(done, site).users
            add.args = add.args[::-1]
        QuantizePaired(PLAN, fit, noted)(done)
        found.append(noted.weights)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
