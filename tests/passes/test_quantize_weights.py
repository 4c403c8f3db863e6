"""Weights on their grids: stored under the linear's name, computed with as if dequantised."""

import torch
import torch.nn.functional as F
from torch import Tensor

from passes.graph import attributes
from passes.quant_spec import QuantPlan, QuantSpec
from passes.quantize_weights import QuantizeWeights
from passes.solvers.nearest import round_to_nearest
from plugins.dequantize import dequantize
from tests.passes.sketch import Sketch, assert_untouched, aten, count, edited, only, ops

LINEAR, HEAD = QuantSpec(w_bits=4, w_group=4), QuantSpec(w_bits=8)


def solve(site: str, weight: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    return round_to_nearest(weight, bits=spec.w_bits, group=spec.w_group)


def down_and_head() -> torch.fx.GraphModule:
    sketch = Sketch()
    x = sketch.linear(sketch.input("x"), "blocks.0.mlp.down_proj", torch.randn(8, 8), torch.randn(8))
    return sketch.output(sketch.linear(x, "head", torch.randn(6, 8)))


def test_every_linear_by_its_own_spec() -> None:
    graph = down_and_head()
    asked = []

    def note(site: str, weight: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        asked.append((site, tuple(weight.shape), spec))
        return solve(site, weight, spec)

    done, counts = edited(graph, QuantizeWeights(QuantPlan(linear=LINEAR, head=HEAD), note))
    assert counts == [2]
    assert asked == [("blocks.0.mlp.down_proj", (8, 8), LINEAR), ("head", (6, 8), HEAD)]
    assert (count(graph, ops.dequantize.default), count(done, ops.dequantize.default)) == (0, 2)
    assert count(done, aten.linear.default) == 2
    assert {name: (value.dtype, tuple(value.shape)) for name, value in attributes(done).items()} == {
        "blocks.0.mlp.down_proj.codes": (torch.int8, (8, 8)),
        "blocks.0.mlp.down_proj.w_scale": (torch.float32, (8, 2)),
        "blocks.0.mlp.down_proj.bias": (torch.float32, (8,)),
        "head.codes": (torch.int8, (6, 8)),
        "head.w_scale": (torch.float32, (6, 1)),
    }


def test_values_are_those_of_the_dequantised_weights() -> None:
    graph = down_and_head()
    old = attributes(graph)
    done, _ = edited(graph, QuantizeWeights(QuantPlan(linear=LINEAR, head=HEAD), solve))
    x = torch.randn(3, 5, 8)
    hidden, head = (
        dequantize(*solve("", old[f"{site}.weight"], spec), spec.w_bits, spec.w_group)
        for site, spec in (("blocks.0.mlp.down_proj", LINEAR), ("head", HEAD))
    )
    assert torch.equal(done(x), F.linear(F.linear(x, hidden, old["blocks.0.mlp.down_proj.bias"]), head))


def test_skipped_and_unplanned_linears_keep_their_weights() -> None:
    graph = down_and_head()
    plan = QuantPlan(linear=LINEAR, head=HEAD, skip=("*.down_proj",))
    done, counts = edited(graph, QuantizeWeights(plan, solve))
    assert counts == [1]
    assert "blocks.0.mlp.down_proj.weight" in attributes(done)
    assert only(done, ops.dequantize.default).args[2:] == (8, 0)


def test_no_spec_or_sixteen_bits_changes_nothing() -> None:
    assert_untouched(down_and_head(), QuantizeWeights(QuantPlan(linear=None, head=None), solve))
    floats = QuantSpec(w_bits=16)
    assert_untouched(down_and_head(), QuantizeWeights(QuantPlan(linear=floats, head=floats), solve))


def test_quantised_weights_are_not_quantised_again() -> None:
    edit = QuantizeWeights(QuantPlan(linear=LINEAR, head=HEAD), solve)
    done, _ = edited(down_and_head(), edit)
    assert_untouched(done, edit)
