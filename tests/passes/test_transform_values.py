"""Values transformed head by head leave the function as it was, each value head by its own matrix."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from passes.graph import attributes
from passes.transform_values import TransformValues, ValueTransform
from tests.passes.conftest import Whole
from tests.passes.rewrites import Feeds, assert_same_logits, on_shapes, values_of
from tests.passes.sketch import assert_untouched, aten, edited
from tests.passes.test_producers import attention

SDPA = aten.scaled_dot_product_attention.default


def drawn(*shape: int, seed: int = 0) -> ValueTransform:
    """Invertible matrices that are not orthogonal."""
    draw = torch.Generator().manual_seed(seed)
    skew = torch.randn(*shape, shape[-1], generator=draw, dtype=torch.float64) / (2 * shape[-1])
    fold = torch.eye(shape[-1], dtype=torch.float64) + skew
    return ValueTransform(fold=fold, unfold=torch.linalg.inv(fold).mT)


@settings(max_examples=20)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 5), st.booleans(), st.booleans(), st.integers(0, 99))
def test_each_value_head_has_its_own(groups: int, repeats: int, size: int, bias: bool, shared: bool, seed: int) -> None:
    graph = attention(groups, repeats, size, bias=bias)
    found = drawn(*(() if shared else (groups,)), size, seed=seed)
    asked = []

    def solve(site: str, channels: int) -> ValueTransform:
        asked.append((site, channels))
        return found

    made, counts = edited(graph, TransformValues(solve))
    assert (counts, asked) == ([1], [("attn.o_proj", size)])
    x = torch.randn(2, 5, 6)
    assert (made(x) - graph(x)).abs().max() <= 1e-4 * graph(x).abs().max()
    (before,), (after,) = (values_of(each, SDPA, (x,)) for each in (graph, made))
    folds = found.fold.expand(groups, size, size)
    for head in range(groups * repeats):
        wanted = before[:, head].double() @ folds[head // repeats]
        assert (after[:, head] - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("family", ["llada", "dream", "odd"])
def test_whole_models_keep_their_logits(whole: Whole, feeds: Feeds, family: str) -> None:
    graph = whole(family)
    made, counts = edited(graph, TransformValues(lambda _, size: drawn(size)))
    assert counts == [2]
    assert_same_logits(graph, made, feeds)


def test_shapes_alone_are_not_solved_for(whole: Whole) -> None:
    def never(site: str, size: int) -> ValueTransform:
        raise AssertionError(site)

    graph = on_shapes(whole("dream"))
    before = {name: value.shape for name, value in attributes(graph).items()}
    assert TransformValues(never)(graph) == 2
    assert {name: value.shape for name, value in attributes(graph).items()} == before


def test_what_is_not_asked_for_stays() -> None:
    assert_untouched(attention(2, 2, 3), TransformValues(lambda *_: None))


@pytest.mark.parametrize(
    ("fold", "unfold", "message"),
    [
        (torch.eye(2), torch.eye(2), "of 2 value heads of 3 channels at attn.o_proj have shapes"),
        (torch.eye(3).expand(4, 3, 3), torch.eye(3).expand(4, 3, 3), "have shapes"),
        (torch.eye(3).expand(2, 3, 3), torch.eye(3), "have shapes"),
        (2 * torch.eye(3), 2 * torch.eye(3), "are not given with their inverses"),
        (torch.eye(3), torch.full((3, 3), torch.nan), "are not given with their inverses"),
    ],
)
def test_bad_transforms_are_refused(fold: Tensor, unfold: Tensor, message: str) -> None:
    graph = attention(2, 2, 3, bias=True)
    before = dict(attributes(graph))
    with pytest.raises(ValueError, match=message):
        TransformValues(lambda *_: ValueTransform(fold=fold.double(), unfold=unfold.double()))(graph)
    assert attributes(graph) == before
