"""Scaled channels leave the function as it was, with shared value heads and biases, and bad scales are named."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from passes.fold_norm import FoldNorm
from passes.fold_scale import FoldScale, ScaleSolver
from passes.graph import attribute, attributes, calls, node_of, site_of
from pipeline.capture import capture_whole
from tests.passes.sketch import Sketch, aten, edited
from tests.passes.test_producers import attention, mlp
from tests.pipeline.random_models import tiny


def drawn(graph: torch.fx.GraphModule, *, seed: int = 0) -> ScaleSolver:
    """Scales between 1/4 and 4 for every linear."""
    widths = {site_of(n): attribute(graph, node_of(n.args[1])).shape[1] for n in calls(graph, aten.linear.default)}
    draw = torch.Generator().manual_seed(seed)
    scales = {site: 4 ** (2 * torch.rand(width, generator=draw) - 1) for site, width in widths.items()}
    return scales.get


@pytest.mark.parametrize("family", ["llada", "dream"])
@pytest.mark.parametrize("norms_folded", [False, True])
def test_whole_models_keep_their_records(family: str, norms_folded: bool, whole, feeds) -> None:  # type: ignore[no-untyped-def]
    graph = whole(family)
    expected = graph(*feeds)
    passes = [FoldNorm()] * norms_folded + [FoldScale(drawn(graph))]
    scaled, counts = edited(graph, *passes)
    assert counts[-1] == 9  # four a block, and the head
    before, after = attributes(graph), attributes(scaled)
    assert list(before) == list(after)
    assert not any(torch.equal(before[name], after[name]) for name in before if "proj" in name)
    for found, wanted in list(zip(scaled(*feeds), expected, strict=True))[1:]:
        assert (found - wanted).abs().max() <= 1e-5 * wanted.abs()[wanted.abs() < 1e8].max()


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.booleans(), st.integers(0, 99))
def test_grouped_heads_share_one_scale(groups: int, repeats: int, size: int, bias: bool, seed: int) -> None:
    graph = attention(groups, repeats, size, bias=bias)
    x = torch.randn(2, 5, 6)
    expected = graph(x)
    solve = drawn(graph, seed=seed)
    scaled, counts = edited(graph, FoldScale(lambda site: solve(site) if site == "attn.o_proj" else None))
    assert counts == [1]
    assert (scaled(x) - expected).abs().max() <= 1e-5 * expected.abs().max()
    ratio = attributes(scaled)["attn.o_proj.weight"][0] / attributes(graph)["attn.o_proj.weight"][0]
    given_scale = solve("attn.o_proj")
    assert given_scale is not None
    heads = given_scale.double().reshape(groups, repeats, size)
    means = heads.log().mean(1, keepdim=True).exp().expand_as(heads).flatten()
    assert (ratio - means).abs().max() <= 1e-5 * means.max()


def test_the_gate_keeps_its_rows() -> None:
    graph = mlp(bias=True)
    x = torch.randn(3, 6)
    scale = torch.tensor([2.0, 0.5, 1.0, 4.0, 8.0])
    scaled, _ = edited(graph, FoldScale({"mlp.down_proj": scale}.get))
    before, after = attributes(graph), attributes(scaled)
    for part in ("weight", "bias"):
        name = f"mlp.gate_up_proj.{part}"
        assert torch.equal(after[name][0::2], before[name][0::2])
        rows = scale if part == "bias" else scale[:, None]
        assert torch.equal(after[name][1::2] * rows, before[name][1::2])
    assert torch.equal(after["mlp.down_proj.weight"], before["mlp.down_proj.weight"] * scale)
    assert torch.equal(scaled(x), graph(x))  # powers of two: nothing rounds


def test_shapes_alone_stay_as_they_are() -> None:
    graph = capture_whole(tiny(shifted=True).config, top_k=4)
    before = {name: value.shape for name, value in attributes(graph).items()}

    def never(site: str) -> Tensor:
        raise AssertionError(site)

    assert FoldScale(never)(graph) == 0
    assert {name: value.shape for name, value in attributes(graph).items()} == before


@pytest.mark.parametrize(
    "scale",
    [torch.ones(4), torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0]), torch.full((5,), torch.nan), torch.full((5,), torch.inf)],
    ids=["short", "zero", "nan", "infinite"],
)
def test_bad_scales_are_refused(scale: Tensor) -> None:
    graph = mlp()
    before = dict(attributes(graph))
    with pytest.raises(ValueError, match=r"scales of mlp\.down_proj are not 5 positive numbers"):
        FoldScale({"mlp.down_proj": scale}.get)(graph)
    assert attributes(graph) == before


def test_a_linear_without_producer_is_named() -> None:
    sketch = Sketch()
    x = sketch.input("x")
    graph = sketch.output(sketch.linear(x, "first", torch.randn(3, 4)))
    with pytest.raises(ValueError, match="the input of first cannot be scaled"):
        FoldScale({"first": torch.ones(4)}.get)(graph)
