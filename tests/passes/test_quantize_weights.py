"""Weights on their grids: stored under the linear's name, computed with as if dequantised."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from passes.graph import attributes
from passes.invariants import check_quantized
from passes.quant_spec import QuantPlan, QuantSpec
from passes.quantize_weights import QuantizeWeights, nearest
from passes.solvers.grid import Grid
from plugins.dequantize import dequantize
from tests.passes.sketch import Sketch, assert_untouched, aten, count, edited, only, ops

LINEAR, HEAD = QuantSpec(w_bits=4, w_group=4), QuantSpec(w_bits=8)
SKEWED = replace(LINEAR, w_symmetric=False)


DOWN = "blocks.0.mlp.down_proj"


def down_and_head() -> torch.fx.GraphModule:
    sketch = Sketch()
    x = sketch.linear(sketch.input("x"), "blocks.0.mlp.down_proj", torch.randn(8, 8), torch.randn(8))
    return sketch.output(sketch.linear(x, "head", torch.randn(6, 8)))


def test_every_linear_by_its_own_spec() -> None:
    graph = down_and_head()
    asked = []

    def note(site: str, weight: Tensor, spec: QuantSpec) -> Grid:
        asked.append((site, tuple(weight.shape), spec))
        return nearest(site, weight, spec)

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


@pytest.mark.parametrize("linear", [LINEAR, SKEWED])
def test_values_are_those_of_the_dequantised_weights(linear: QuantSpec) -> None:
    graph = down_and_head()
    old = attributes(graph)
    done, _ = edited(graph, QuantizeWeights(QuantPlan(linear=linear, head=HEAD), nearest))
    check_quantized(done)
    x = torch.randn(3, 5, 8)
    grids = [(nearest("", old[f"{site}.weight"], spec), spec) for site, spec in ((DOWN, linear), ("head", HEAD))]
    hidden, head = (dequantize(g.codes, g.scale, spec.w_bits, spec.w_group, g.zero) for g, spec in grids)
    assert (f"{DOWN}.w_zero" in attributes(done)) == (linear is SKEWED)
    assert torch.equal(done(x), F.linear(F.linear(x, hidden, old[f"{DOWN}.bias"]), head))


def test_skipped_and_unplanned_linears_keep_their_weights() -> None:
    graph = down_and_head()
    plan = QuantPlan(linear=LINEAR, head=HEAD, skip=("*.down_proj",))
    done, counts = edited(graph, QuantizeWeights(plan, nearest))
    assert counts == [1]
    assert "blocks.0.mlp.down_proj.weight" in attributes(done)
    assert only(done, ops.dequantize.default).args[2:] == (8, 0)


def test_no_spec_or_sixteen_bits_changes_nothing() -> None:
    assert_untouched(down_and_head(), QuantizeWeights(QuantPlan(linear=None, head=None), nearest))
    floats = QuantSpec(w_bits=16)
    assert_untouched(down_and_head(), QuantizeWeights(QuantPlan(linear=floats, head=floats), nearest))


def test_quantised_weights_are_not_quantised_again() -> None:
    edit = QuantizeWeights(QuantPlan(linear=LINEAR, head=HEAD), nearest)
    done, _ = edited(down_and_head(), edit)
    assert_untouched(done, edit)


@pytest.mark.parametrize("spoil", ["codes", "groups", "zero", "no zero"])
def test_a_grid_that_does_not_fit_is_refused(spoil: str) -> None:
    linear = LINEAR if spoil == "zero" else SKEWED

    def spoilt(site: str, weight: Tensor, spec: QuantSpec) -> Grid:
        good = nearest(site, weight, spec)
        bad = {
            "codes": {"codes": good.codes[:, :4]},
            "groups": {"scale": good.scale[:, :1]},
            "zero": {"zero": good.scale.to(torch.int8)},
            "no zero": {"zero": None},
        }
        return replace(good, **bad[spoil])

    with pytest.raises(ValueError, match=r"the grid of blocks\.0\.mlp\.down_proj has codes"):
        edited(down_and_head(), QuantizeWeights(QuantPlan(linear=linear, head=None), spoilt))


def test_a_linear_without_a_stored_weight_is_not_left_out_in_silence() -> None:
    sketch = Sketch()
    weight = sketch(aten.to.dtype, sketch.weight(f"{DOWN}.weight_half", torch.ones(8, 8).half()), torch.float32)
    graph = sketch.output(sketch(aten.linear.default, sketch.input("x"), weight))
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp\.down_proj does not read a stored weight"):
        edited(graph, QuantizeWeights(QuantPlan(linear=LINEAR, head=None), nearest))
