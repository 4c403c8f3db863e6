"""A transform before a linear and its inverse in the weight change nothing, for any invertible factors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import GraphModule

from passes.graph import attributes, node_of
from passes.insert_transform import InsertTransform, Transform
from passes.solvers.draws import generator
from tests.passes.sketch import Sketch, assert_untouched, copy_of, count, edited, only, ops

SITE = "a.o_proj"


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed, str(shape)))


def linear_of(width: int, *, prepared: bool = False) -> GraphModule:
    sketch = Sketch()
    x = sketch.input("x")
    if prepared:
        gain = sketch.weight("norm.weight", drawn(width).abs() + 0.5)
        x = sketch(ops.prepare.default, x, gain, None, None, None, None, None, None, 1e-3)
    one = sketch.linear(x, SITE, drawn(6, width), drawn(6))
    return sketch.output(one, sketch.linear(one, "a.head", drawn(2, 6)))


def invertible(size: int, seed: int) -> Tensor:
    return torch.eye(size) * 3 + drawn(size, size, seed=seed).clamp(-0.5, 0.5)


def transform(a: int, b: int, seed: int = 0) -> Transform:
    return Transform(left=invertible(a, seed).double(), right=invertible(b, seed + 1).double())


def inserting(made: Transform) -> InsertTransform:
    return InsertTransform(lambda site: made if site == SITE else None)


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 20))
def test_nothing_changes_for_any_factors(a: int, b: int, seed: int) -> None:
    graph = linear_of(a * b)
    made, counts = edited(graph, inserting(transform(a, b, seed)))
    assert counts == [1]
    assert count(made, ops.prepare.default) == 1
    x = drawn(3, 4, a * b, seed=seed)
    found, expected = made(x)[0], graph(x)[0]
    # Sums of a x b products of factors below 4 and weights below 4, rounded to float32 four times.
    assert (found - expected).abs().max() <= 1e-5 * (1 + expected.abs().max())
    assert torch.equal(attributes(made)[f"{SITE}.left"], transform(a, b, seed).left.float())


def test_the_weight_matches_the_factors_that_are_stored() -> None:
    """Of a factor that is nearly singular, float32 has another inverse than float64 had."""
    nearly = torch.tensor([[1.0, 1.0], [1.0, 1.0 + 3e-6]], dtype=torch.float64)
    made, _ = edited(linear_of(6), inserting(Transform(left=invertible(3, 0), right=nearly)))
    weights = attributes(made)
    dense = torch.kron(weights[f"{SITE}.left"].double(), weights[f"{SITE}.right"].double())
    expected = drawn(6, 6).double() @ torch.linalg.inv(dense).T
    assert (weights[f"{SITE}.weight"] - expected).abs().max() <= 2.0**-23 * expected.abs().max()


def test_a_prepare_before_takes_the_transform_in() -> None:
    graph = linear_of(12, prepared=True)
    made, counts = edited(graph, inserting(transform(3, 4)))
    assert counts == [1]
    prepare = only(made, ops.prepare.default)
    assert node_of(prepare.args[1]).target == "norm.weight"
    assert prepare.args[8] == 1e-3
    x = drawn(2, 5, 12)
    found, expected = made(x)[0], graph(x)[0]
    assert (found - expected).abs().max() <= 1e-5 * (1 + expected.abs().max())


def test_factors_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        edited(linear_of(8), inserting(Transform(left=torch.eye(2), right=torch.eye(5))))


def test_a_second_transform_is_refused() -> None:
    with pytest.raises(ValueError, match="transformed already"):
        edited(linear_of(8), inserting(transform(2, 4)), inserting(transform(2, 4)))


def test_sites_without_a_transform_stay() -> None:
    assert_untouched(linear_of(8), InsertTransform(lambda site: None))


def test_on_shapes_alone_the_graph_is_the_same() -> None:
    graph = linear_of(6)
    shapes = copy_of(graph)
    for name, value in attributes(shapes).items():
        owner = shapes.get_submodule(name.rpartition(".")[0])
        owner.register_buffer(name.rpartition(".")[2], value.to("meta"))
    real, _ = edited(graph, inserting(transform(2, 3)))
    found, _ = edited(shapes, inserting(transform(2, 3)))
    assert str(found.graph) == str(real.graph)
    assert {n: v.shape for n, v in attributes(found).items()} == {n: v.shape for n, v in attributes(real).items()}
    assert all(value.is_meta for value in attributes(found).values())
