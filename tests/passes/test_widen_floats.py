"""Float parts in float64: the same function, closer to real numbers, and float32 at every seam."""

import torch
from torch import Tensor

from passes.base import run
from passes.graph import attributes, calls
from passes.insert_fake_quant import InsertFakeQuant
from passes.invariants import check_quantized
from passes.quant_spec import QuantPlan, QuantSpec
from passes.quantize_weights import QuantizeWeights
from passes.solvers.nearest import round_to_nearest
from passes.widen_floats import WIDENED, WidenFloats
from tests.passes.conftest import Whole
from tests.passes.sketch import Sketch, aten, count, edited, ops


def test_a_linear_is_summed_in_float64_and_rounded_once() -> None:
    sketch = Sketch()
    weight, bias = torch.randn(5, 64), torch.randn(5)
    graph = sketch.output(sketch.linear(sketch.input("x"), "a", weight, bias))
    widened, counts = edited(graph, WidenFloats())
    assert counts == [1]
    x = torch.randn(7, 64) * 1e3
    expected = torch.nn.functional.linear(x.double(), weight.double(), bias.double()).float()
    assert torch.equal(widened(x), expected)
    assert not torch.equal(graph(x), expected)


def test_attention_keeps_its_mask() -> None:
    sketch = Sketch()
    names = ("q", "k", "v", "mask")
    graph = sketch.output(sketch(aten.scaled_dot_product_attention.default, *map(sketch.input, names)))
    widened, counts = edited(graph, WidenFloats())
    assert counts == [1]
    q, k, v = (torch.randn(2, 2, 5, 8) for _ in range(3))
    mask = torch.arange(5).expand(2, 1, 5, 5) < 3
    expected = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), mask).float()
    assert torch.equal(widened(q, k, v, mask), expected)
    v[:, :, 3:] = torch.nan
    assert widened(q, k, torch.nan_to_num(v), mask).isfinite().all()


def test_a_second_run_finds_nothing() -> None:
    sketch = Sketch()
    once, _ = edited(sketch.output(sketch(aten.silu.default, sketch.input("x"))), WidenFloats())
    _, counts = edited(once, WidenFloats())
    assert counts == [0]


def test_whole_simulated_graphs_stay_float32_at_every_quantiser(whole: Whole, feeds: tuple[Tensor, ...]) -> None:
    plan = QuantPlan(linear=QuantSpec(w_bits=8, a_bits=8), head=None)
    solve = lambda site, weight, spec: round_to_nearest(weight, bits=8, group=0)  # noqa: E731
    graph = whole("dream")
    run(graph, [QuantizeWeights(plan, solve), InsertFakeQuant(plan)], check_quantized)
    widened, (number,) = edited(graph, WidenFloats())
    assert number == sum(count(graph, op) for op in WIDENED)
    assert set(attributes(widened)) == set(attributes(graph))
    for node in calls(widened, ops.fake_quant.default):
        assert node.args[0].target is not aten.linear.default  # never what is still wide
    *_, found = widened(*feeds)
    *_, expected = graph(*feeds)
    assert found.dtype is torch.float32
    size = expected.abs()[expected.abs() < 1e8].max()
    assert (found - expected).abs().max() <= 0.05 * size  # a code may move by a step of 1/127 of its row
