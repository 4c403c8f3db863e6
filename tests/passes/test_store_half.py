"""Float weights in half the bytes: exact where they fit, refused where they leave the range."""

import pytest
import torch
import torch.nn.functional as F

from passes.graph import attributes
from passes.solvers.nearest import round_to_nearest
from passes.store_half import HalfRangeError, StoreHalf
from tests.passes.sketch import Sketch, assert_untouched, aten, count, edited, ops

IDS = torch.tensor([[0, 4, 4], [2, 1, 3]])


def ends(table: torch.Tensor, weight: torch.Tensor) -> torch.fx.GraphModule:
    """Embedding, norm, LM head with a bias."""
    sketch = Sketch()
    rows = sketch(aten.embedding.default, sketch.weight("embed.weight", table), sketch.input("ids"))
    x = sketch(aten.rms_norm.default, rows, [8], sketch.weight("norm.weight", torch.randn(8)), 1e-5)
    return sketch.output(sketch.linear(x, "head", weight, torch.randn(6)))


def test_weights_are_stored_in_half_and_vectors_are_not() -> None:
    table, weight = torch.randn(5, 8), torch.randn(6, 8)
    graph = ends(table, weight)
    done, counts = edited(graph, StoreHalf())
    assert counts == [2]
    assert (count(graph, aten.to.dtype), count(done, aten.to.dtype)) == (0, 2)
    assert {name: value.dtype for name, value in attributes(done).items()} == {
        "embed.weight_half": torch.float16,
        "head.weight_half": torch.float16,
        "norm.weight": torch.float32,
        "head.bias": torch.float32,
    }
    vectors = attributes(graph)
    x = F.rms_norm(table.half().float()[IDS], (8,), vectors["norm.weight"], 1e-5)
    assert torch.equal(done(IDS), F.linear(x, weight.half().float(), vectors["head.bias"]))


def test_weights_that_are_halves_already_change_no_value() -> None:
    graph = ends(torch.randn(5, 8).half().float(), torch.randn(6, 8).half().float())
    done, _ = edited(graph, StoreHalf())
    assert torch.equal(done(IDS), graph(IDS))


def test_embedding_in_eight_bits_is_codes_times_scales() -> None:
    table = torch.randn(5, 8) * torch.tensor([[1.0], [100.0], [0.0], [1e-3], [1.0]])
    sketch = Sketch()
    rows = sketch(aten.embedding.default, sketch.weight("embed.weight", table), sketch.input("ids"))
    done, counts = edited(sketch.output(rows), StoreHalf(embedding_bits=8))
    assert counts == [1]
    grid = round_to_nearest(table, bits=8, group=0)
    assert {name: value.dtype for name, value in attributes(done).items()} == {
        "embed.codes": torch.int8,
        "embed.w_scale": torch.float32,
    }
    assert torch.equal(done(IDS), (grid.codes.float() * grid.scale)[IDS])
    assert (done(IDS) - table[IDS]).abs().max() <= 0.5001 * table.abs().max() / 127


def test_quantised_linears_are_left_alone() -> None:
    sketch = Sketch()
    codes = sketch.weight("head.codes", torch.ones(4, 8, dtype=torch.int8))
    scale = sketch.weight("head.w_scale", torch.ones(4, 1))
    weight = sketch(ops.dequantize.default, codes, scale, 8, 0)
    assert_untouched(sketch.output(sketch(aten.linear.default, sketch.input("x"), weight)), StoreHalf())


@pytest.mark.parametrize("spoilt", [65520.0, -1e6, float("nan"), float("inf")])
def test_a_weight_beyond_the_range_is_named(spoilt: float) -> None:
    weight = torch.zeros(6, 8)
    weight[3, 2] = spoilt
    with pytest.raises(HalfRangeError, match=r"head\.weight leaves the range of float16"):
        StoreHalf()(ends(torch.zeros(5, 8), weight))
    with pytest.raises(HalfRangeError, match=r"embed\.weight leaves the range of float16"):
        StoreHalf()(ends(weight, torch.zeros(6, 8)))


def test_the_largest_half_is_in_range() -> None:
    done, _ = edited(ends(torch.zeros(5, 8), torch.full((6, 8), 65504.0)), StoreHalf())
    assert bool((attributes(done)["head.weight_half"] == 65504.0).all())


def test_weights_without_values_pass_by_shape() -> None:
    graph = ends(torch.empty(5, 8, device="meta"), torch.empty(6, 8, device="meta"))
    done, _ = edited(graph, StoreHalf(embedding_bits=8))
    shapes = {name: tuple(value.shape) for name, value in attributes(done).items()}
    assert shapes["embed.codes"] == (5, 8)
    assert shapes["embed.w_scale"] == (5, 1)
    assert shapes["head.weight_half"] == (6, 8)
