"""TAC in a block: the equations on rows that are collected one by one, and where it must change nothing."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from passes.base import Pass, run
from passes.fit import Batch, CalibrationError, Fit
from passes.graph import attributes, calls, node_of, update_attributes
from passes.insert_fake_quant import InsertFakeQuant
from passes.insert_tac import InsertTac
from passes.insert_transform import InsertTransform, Transform
from passes.invariants import check_lowered, check_quantized
from passes.lowering import LOWERING
from passes.options import Options, Tac
from passes.quant_spec import AttentionSpec, QuantPlan, QuantSpec
from passes.quantize_attention import QuantizeAttention
from passes.quantize_weights import QuantizeWeights, nearest
from passes.solvers.draws import generator
from passes.solvers.hadamard import random_orthogonal
from passes.solvers.tac import block_size, chosen, covariance, moments
from pipeline.capture import materialise
from plugins.quantize import QUANTIZE
from tests.passes.blocks import SITES, block, samples
from tests.passes.conftest import Whole
from tests.passes.lockstep import Values, assert_lowered_equals_simulated
from tests.passes.samples import Listed
from tests.passes.sketch import assert_untouched, copy_of, count, only, ops

O_PROJ = SITES[1]
LEAVES = (f"{O_PROJ}.tac_matrix", f"{O_PROJ}.tac_bias")
PLAN = QuantPlan(linear=QuantSpec(w_bits=4, a_bits=4), head=None, attention=AttentionSpec(v_bits=4, prob_bits=2))
Form = Literal["none", "covariance", "paired"]
BOTH: tuple[Form, ...] = ("covariance", "paired")


def with_tac(form: Form = "paired", *, block: int = 16, samples: int = 64, plan: QuantPlan = PLAN) -> QuantPlan:
    return replace(plan, options=Options(tac=Tac(form=form, block=block, samples=samples)))


def transformed(graph: GraphModule) -> GraphModule:
    """Every output of attention behind a turn of its own, in place."""

    def turn(site: str) -> Transform | None:
        draw = generator(0, site)
        return Transform(left=_drawn(4, draw), right=_drawn(8, draw)) if site.endswith(".o_proj") else None

    run(graph, [InsertTransform(turn)], lambda _: None)
    return graph


def _drawn(size: int, draw: torch.Generator) -> Tensor:
    return random_orthogonal(size, draw).float()


def finished(plan: QuantPlan) -> list[Pass]:
    """All but what is compensated."""
    return [QuantizeWeights(plan, nearest), InsertFakeQuant(plan), QuantizeAttention(plan)]


def quantised(graph: GraphModule, plan: QuantPlan = PLAN) -> GraphModule:
    """A copy on its grids."""
    made = copy_of(graph)
    run(made, finished(plan), check_quantized)
    return made


def disturbed(given: Listed, size: float, canvases: Sequence[int] = range(100)) -> Listed:
    """The same batches as quantised blocks before them give them."""
    batches = []
    for batch in given:
        x = batch.inputs[0].clone()
        for row in range(len(x)):
            if batch.first + row in canvases:
                x[row] += size * torch.randn(x[row].shape)
        batches.append(replace(batch, inputs=(x, *batch.inputs[1:])))
    return Listed(batches)


def attention_rows(graph: GraphModule, given: Listed, numbers: Sequence[int]) -> Tensor:
    """Attention's output [M, K] at the valid rows of the canvases named, one after another."""
    node = only(graph, ops.prepare.default)
    rows = []
    for batch in given:
        seen = Values(graph)
        seen.run(*batch.inputs)
        for row, valid in enumerate(batch.valid):
            if batch.first + row in numbers:
                rows += list(seen.values[node_of(node.args[0])][row, valid])
    return torch.stack(rows)


class Case:
    """A block in float and quantised, and the inputs of both."""

    def __init__(self, canvases: int = 8) -> None:
        self.reference = transformed(block())
        self.graph = quantised(self.reference)
        self.samples = samples(canvases)
        self.quantized = disturbed(self.samples, 0.05)

    def fit(self) -> Fit:
        return Fit(samples=self.samples, quantized=self.quantized, reference=self.reference)

    def compensated(self, plan: QuantPlan) -> tuple[GraphModule, float]:
        """A copy with TAC, and what it leaves of the error."""
        fit, made = self.fit(), copy_of(self.graph)
        assert run(made, [InsertTac(plan, fit)], check_quantized) == {"InsertTac": 1}
        assert fit.numbers.keys() == {f"{O_PROJ}.tac"}
        return made, fit.numbers[f"{O_PROJ}.tac"]


@pytest.mark.parametrize("size", [16, 5, 100])
@pytest.mark.parametrize("form", BOTH)
def test_maps_are_those_of_the_rows(form: Form, size: int) -> None:
    torch.manual_seed(1)
    case = Case(33)
    made, share = case.compensated(with_tac(form, block=size))
    held, width = range(1, 33, 4), block_size(32, size)
    parts = [
        moments(
            attention_rows(case.reference, case.samples, numbers),
            attention_rows(case.graph, case.quantized, numbers),
            width,
        )
        for numbers in ([n for n in range(33) if n not in held], held)
    ]
    tac = Tac()
    expected = (
        chosen(*parts, rho=tac.rho)
        if form == "paired"
        else covariance(parts[0], rho=tac.rho, eta=tac.eta, alpha=tac.alpha)
    )
    matrix, bias = (attributes(made)[name] for name in LEAVES)
    assert (matrix.shape, bias.shape) == ((32 // width, width, width), (32,))
    torch.testing.assert_close(matrix, expected.matrix.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(bias, expected.bias.flatten().float(), rtol=1e-4, atol=1e-5)
    full, rows = attention_rows(case.reference, case.samples, held), attention_rows(made, case.quantized, held)
    mapped = torch.einsum("boi,mbi->mbo", matrix, torch.unflatten(rows, -1, (-1, width))).flatten(-2) + bias
    assert share < 1
    assert share == pytest.approx(float((full - mapped).square().sum() / (full - rows).square().sum()), rel=1e-3)


@torch.no_grad()
def test_exact_quantisers_leave_the_identity() -> None:
    """The same rows in both: nothing is below an error of nothing, and the block's output stays to the bit."""
    case = Case()
    case.graph = case.reference
    case.quantized = case.samples
    for form in BOTH:
        made, share = case.compensated(with_tac(form))
        matrix, bias = (attributes(made)[name] for name in LEAVES)
        assert share == 1.0
        assert torch.equal(matrix, torch.eye(16).repeat(2, 1, 1))
        assert torch.equal(bias, torch.zeros(32))
        for batch in case.samples:
            assert torch.equal(made(*batch.inputs), case.reference(*batch.inputs))


@pytest.mark.parametrize("form", BOTH)
def test_what_does_not_help_on_canvases_held_out_is_not_kept(form: Form) -> None:
    case = Case()
    case.graph = case.reference
    case.quantized = disturbed(case.samples, 1.0, [0, 2, 3, 4, 6, 7])  # 1 and 5 are held out, and exact
    made, share = case.compensated(with_tac(form))
    assert share == 1.0
    assert torch.equal(attributes(made)[LEAVES[0]], torch.eye(16).repeat(2, 1, 1))
    case.quantized = disturbed(case.samples, 0.2)
    assert case.compensated(with_tac("paired"))[1] < 1


def test_only_the_first_canvases_count_and_no_padding() -> None:
    """The last one that counts is not the last of its batch."""
    case = Case(20)
    few = with_tac(samples=15)
    expected, share = case.compensated(few)
    assert share < 1
    case.samples, case.quantized = (padded(shortened(each, 15)) for each in (case.samples, case.quantized))
    found, again = case.compensated(few)
    assert share == pytest.approx(again)
    for name in LEAVES:
        torch.testing.assert_close(attributes(found)[name], attributes(expected)[name])
    assert case.compensated(with_tac(samples=1))[1] == 1.0  # with none held out nothing can be said


def shortened(given: Listed, count: int) -> Listed:
    """The first `count` canvases one by one, the others as noise."""
    batches = []
    for batch in given:
        for row in range(len(batch.valid)):
            part = slice(row, row + 1)
            x, *rest = (value[part] for value in batch.inputs)
            x = x if batch.first + row < count else torch.randn(x.shape)
            batches.append(
                Batch(
                    inputs=(x, *rest),
                    valid=batch.valid[part],
                    masked=batch.masked[part],
                    noise=batch.noise[part],
                    first=batch.first + row,
                )
            )
    return Listed(batches)


def padded(given: Listed) -> Listed:
    """Other values where rows do not count."""
    batches = []
    for batch in given:
        x = torch.where(batch.valid[..., None], batch.inputs[0], 100 * torch.randn(batch.inputs[0].shape))
        batches.append(replace(batch, inputs=(x, *batch.inputs[1:])))
    return Listed(batches)


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_whole_graphs_on_shapes_alone_get_the_same_weights(family: str, whole: Whole) -> None:
    graph = transformed(whole(family).to("meta"))
    run(graph, [*finished(PLAN), InsertTac(with_tac(), Fit())], check_quantized)
    shapes = {name: value for name, value in attributes(graph).items() if ".tac_" in name}
    assert {name: tuple(value.shape) for name, value in shapes.items()} == {
        f"blocks.{index}.attn.o_proj.{leaf}": shape
        for index in range(2)
        for leaf, shape in (("tac_matrix", (2, 16, 16)), ("tac_bias", (32,)))
    }
    made, _ = Case().compensated(with_tac())
    assert all(shapes[name].dtype == attributes(made)[name].dtype == torch.float32 for name in LEAVES)
    assert [node.op for node in made.graph.nodes if ".tac_" in str(node.target)] == ["get_attr"] * 2


@pytest.mark.parametrize("symmetric", [True, False])
@torch.no_grad()
def test_lowered_equals_simulated(whole: Whole, feeds: tuple[Tensor, ...], symmetric: bool) -> None:
    """TAC, transform and grid are one op, and in ONNX one node."""
    plan = QuantPlan(linear=QuantSpec(w_bits=4, a_bits=4, symmetric=symmetric), head=QuantSpec(w_bits=8, a_bits=8))
    weights, simulated = transformed(whole("llada")), transformed(whole("llada").to("meta"))
    run(weights, finished(plan), check_quantized)
    run(simulated, [*finished(plan), InsertTac(with_tac(), Fit())], check_quantized)
    draw = generator(0, "tac")
    drawn = {
        name: (torch.eye(16) if value.ndim == 3 else 0) + 0.1 * torch.randn(value.shape, generator=draw)
        for name, value in attributes(simulated).items()
        if ".tac_" in name
    }
    materialise(simulated, attributes(weights) | drawn)
    lowered = copy_of(simulated)
    counts = run(lowered, LOWERING, check_lowered)
    assert counts["FusePrepare"] == 2
    assert count(lowered, ops.prepare.default) == 0
    fused = [QUANTIZE.arguments(*node.args) for node in calls(lowered, ops.quantize.default)]
    given = [(call["tac_matrix"], call["tac_bias"]) for call in fused if call["tac_matrix"] is not None]
    assert [str(node.target) for pair in given for node in pair] == list(drawn)
    assert assert_lowered_equals_simulated(simulated, lowered, feeds) == 9


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize("which", ["samples", "quantized"])
def test_values_that_are_not_finite_are_refused(which: str, value: float) -> None:
    case = Case()
    batches = list(getattr(case, which))
    x = batches[1].inputs[0].clone()
    x[1, 3, 5] = value  # canvas 3
    batches[1] = replace(batches[1], inputs=(x, *batches[1].inputs[1:]))
    setattr(case, which, Listed(batches))
    what = "the input" if which == "samples" else "the quantised input"
    with pytest.raises(CalibrationError, match=f"{what} of {O_PROJ} has values .* not finite in calibration sample 3;"):
        InsertTac(with_tac(), case.fit())(case.graph)
    assert not [name for name in attributes(case.graph) if ".tac_" in name]


def test_probabilities_that_all_vanish_are_made_good_by_the_mean() -> None:
    """Attention so even that each probability is below half a step of the grid: quantised outputs are all zero."""
    case = Case()
    name = f"{SITES[0]}.weight"
    weight = attributes(case.reference)[name].clone()
    weight[:64] *= 1e-3
    update_attributes(case.reference, {name: weight})
    case.graph = quantised(case.reference, replace(PLAN, attention=AttentionSpec(prob_bits=2)))
    made, share = case.compensated(with_tac())
    assert share < 1
    assert bool(attributes(made)[LEAVES[0]].isfinite().all())
    assert bool((attributes(made)[LEAVES[1]] != 0).all())


def test_misuse_is_refused() -> None:
    case = Case()
    fit = case.fit()
    for lacking in (replace(fit, samples=None), replace(fit, quantized=None), replace(fit, reference=None)):
        with pytest.raises(ValueError, match=f"before {O_PROJ} is compensated by paired samples; there are none"):
            InsertTac(with_tac(), lacking)(case.graph)
    other = Listed(list(case.quantized)[::-1])
    with pytest.raises(ValueError, match=f"paired samples of {O_PROJ} differ; got canvas 6, expected 0"):
        InsertTac(with_tac(), replace(case.fit(), quantized=other))(case.graph)
    made, _ = case.compensated(with_tac())
    with pytest.raises(ValueError, match=f"the input of {O_PROJ} is normed, scaled or compensated already"):
        InsertTac(with_tac(), case.fit())(made)


def test_what_is_not_transformed_stays() -> None:
    skipping = quantised(block())
    for plan in (with_tac(), with_tac("none")):
        assert_untouched(skipping, InsertTac(plan, Fit()))
    assert_untouched(Case().graph, InsertTac(with_tac("none"), Fit()))
