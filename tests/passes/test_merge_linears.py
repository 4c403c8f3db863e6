"""Merged linears compute the same rows; what may not be merged is named or left alone."""

import pytest
import torch
from torch import Tensor

from passes.graph import attribute, attributes, calls, node_of, site_of
from passes.merge_linears import MergeLinears, merged_site
from passes.solvers.nearest import round_to_nearest
from tests.passes.sketch import Sketch, assert_untouched, aten, count, edited, only, ops, whole_numbers

SIZES = {"q": 8, "k": 4, "v": 4}


def attention(*, biased: tuple[str, ...] = ()) -> tuple[torch.fx.GraphModule, dict[str, Tensor]]:
    """q, k and v of one input; whole numbers, so that any order of summing gives the same floats."""
    weights = {name: whole_numbers(rows, 6) for name, rows in SIZES.items()}
    sketch = Sketch()
    x = sketch.input("x")
    results = [
        sketch.linear(x, f"attn.{name}_proj", weight, whole_numbers(len(weight)) if name in biased else None)
        for name, weight in weights.items()
    ]
    return sketch.output(*results), weights


def swiglu(weights: dict[str, Tensor], *, swapped: bool = False, extra: str = "") -> torch.fx.GraphModule:
    """silu(gate) * up; `extra` names a value that is read once more."""
    sketch = Sketch()
    x = sketch.input("x")
    nodes = {name: sketch.linear(x, f"mlp.{name}_proj", weight) for name, weight in weights.items()}
    nodes["active"] = sketch(aten.silu.default, nodes["gate"])
    factors = (nodes["active"], nodes["up"])
    product = sketch(aten.mul.Tensor, *(reversed(factors) if swapped else factors))
    return sketch.output(product, *([nodes[extra]] if extra else []))


def gate_and_up() -> dict[str, Tensor]:
    return {"gate": whole_numbers(6, 4), "up": whole_numbers(6, 4)}


@pytest.mark.parametrize("biased", [(), ("q", "k", "v")])
def test_linears_of_one_input_become_one(biased: tuple[str, ...]) -> None:
    graph, weights = attention(biased=biased)
    x = whole_numbers(2, 3, 6)
    merged, counts = edited(graph, MergeLinears())
    assert counts == [1]
    assert (count(graph, aten.linear.default), count(merged, aten.linear.default)) == (3, 1)
    assert [node.args[1:] for node in calls(merged, aten.slice.Tensor)] == [(-1, 0, 8), (-1, 8, 12), (-1, 12, 16)]
    assert set(attributes(merged)) == {"attn.q_k_v_proj.weight"} | ({"attn.q_k_v_proj.bias"} if biased else set())
    assert torch.equal(attributes(merged)["attn.q_k_v_proj.weight"], torch.cat(list(weights.values())))
    for found, expected in zip(merged(x), graph(x), strict=True):
        assert torch.equal(found, expected)


def test_gate_and_up_are_interleaved() -> None:
    weights = gate_and_up()
    graph = swiglu(weights)
    x = whole_numbers(3, 5, 4)
    merged, counts = edited(graph, MergeLinears())
    assert counts == [1]
    assert (count(graph, aten.linear.default), count(merged, aten.linear.default)) == (2, 1)
    linear = only(merged, aten.linear.default)
    assert site_of(linear) == "mlp.gate_up_proj"
    joined = attribute(merged, node_of(linear.args[1]))
    assert torch.equal(joined[0::2], weights["gate"])
    assert torch.equal(joined[1::2], weights["up"])
    assert torch.equal(merged(x), graph(x))


def test_a_whole_block_is_two_merges() -> None:
    sketch = Sketch()
    x, z = sketch.input("x"), sketch.input("z")
    results = [sketch.linear(x, f"attn.{name}_proj", whole_numbers(4, 4)) for name in "qkv"]
    gate, up = (sketch.linear(z, f"mlp.{name}_proj", whole_numbers(6, 4)) for name in ("gate", "up"))
    product = sketch(aten.mul.Tensor, sketch(aten.silu.default, gate), up)
    graph = sketch.output(*results, sketch.linear(product, "mlp.down_proj", whole_numbers(4, 6)))
    merged, counts = edited(graph, MergeLinears())
    assert counts == [2]
    assert count(merged, aten.linear.default) == 3
    inputs = whole_numbers(2, 4), whole_numbers(2, 4)
    for found, expected in zip(merged(*inputs), graph(*inputs), strict=True):
        # silu of a strided half takes another path than silu of a whole row; its last place may differ.
        assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert_untouched(merged, MergeLinears())


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("group", [0, 2])
def test_codes_of_merged_weights_are_those_of_the_parts(bits: int, group: int) -> None:
    parts = {"gate": torch.randn(6, 4), "up": torch.randn(6, 4) * 5}
    merged, _ = edited(swiglu(parts), MergeLinears())
    joined = round_to_nearest(attributes(merged)["mlp.gate_up_proj.weight"], bits=bits, group=group)
    for start, name in enumerate(("gate", "up")):
        apart = round_to_nearest(parts[name], bits=bits, group=group)
        assert torch.equal(joined.codes[start::2], apart.codes)
        assert torch.equal(joined.scale[start::2], apart.scale)
    graph, weights = attention()
    merged, _ = edited(graph, MergeLinears())
    joined = round_to_nearest(attributes(merged)["attn.q_k_v_proj.weight"], bits=bits, group=group)
    singles = [round_to_nearest(weight, bits=bits, group=group) for weight in weights.values()]
    assert torch.equal(joined.codes, torch.cat([single.codes for single in singles]))
    assert torch.equal(joined.scale, torch.cat([single.scale for single in singles]))


@pytest.mark.parametrize("extra", ["gate", "up", "active"])
def test_gate_and_up_read_elsewhere_are_not_taken_for_a_swiglu(extra: str) -> None:
    graph = swiglu(gate_and_up(), extra=extra)
    x = whole_numbers(3, 4)
    merged, counts = edited(graph, MergeLinears())
    assert counts == [1]  # still one GEMM, the plain way
    assert [node.args[1:] for node in calls(merged, aten.slice.Tensor)] == [(-1, 0, 6), (-1, 6, 12)]
    for found, expected in zip(merged(x), graph(x), strict=True):
        assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_a_product_the_other_way_round_is_merged_the_plain_way() -> None:
    graph = swiglu(gate_and_up(), swapped=True)
    x = whole_numbers(3, 4)
    merged, counts = edited(graph, MergeLinears())
    assert counts == [1]
    assert [node.args[1:] for node in calls(merged, aten.slice.Tensor)] == [(-1, 0, 6), (-1, 6, 12)]
    assert (merged(x) - graph(x)).abs().max() <= 1e-6 * graph(x).abs().max()


def test_linears_of_different_inputs_are_left_alone() -> None:
    sketch = Sketch()
    x, z = sketch.input("x"), sketch.input("z")
    up = sketch.linear(z, "mlp.up_proj", torch.ones(4, 4))
    gate = sketch(aten.silu.default, sketch.linear(x, "mlp.gate_proj", torch.ones(4, 4)))
    assert_untouched(sketch.output(sketch(aten.mul.Tensor, gate, up)), MergeLinears())


def test_biases_come_all_or_none() -> None:
    graph, _ = attention(biased=("q", "v"))
    with pytest.raises(ValueError, match=r"only some linears merged into attn\.q_k_v_proj have a bias"):
        MergeLinears()(graph)


def test_quantised_weights_are_too_late_to_merge() -> None:
    sketch = Sketch()
    x = sketch.input("x")
    results = []
    for name in "qk":
        codes = sketch.weight(f"attn.{name}_proj.codes", torch.ones(4, 4, dtype=torch.int8))
        scale = sketch.weight(f"attn.{name}_proj.w_scale", torch.ones(4, 1))
        results.append(sketch(aten.linear.default, x, sketch(ops.dequantize.default, codes, scale, 4, 0)))
    with pytest.raises(ValueError, match="is quantised already; merge first"):
        MergeLinears()(sketch.output(*results))


def test_names_of_merged_sites() -> None:
    assert merged_site(["a.q_proj", "a.k_proj", "a.v_proj"]) == "a.q_k_v_proj"
    assert merged_site(["blocks.3.mlp.gate_proj", "blocks.3.mlp.up_proj"]) == "blocks.3.mlp.gate_up_proj"
    with pytest.raises(ValueError, match="share an input but not a module"):
        merged_site(["a.q_proj", "b.k_proj"])
    with pytest.raises(ValueError, match="share an input but not an ending"):
        merged_site(["a.q_proj", "a.k_map"])
