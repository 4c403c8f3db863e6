"""Rotations of stream, values and keys leave the logits where they were, and turn what they say they turn."""

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from passes.base import Pass, run
from passes.fold_norm import FoldNorm
from passes.graph import attributes, calls, node_of, set_attributes
from passes.invariants import check_rewritten
from passes.rotate_keys import RotateKeys
from passes.rotate_stream import RotateStream, stream_rotation
from passes.rotate_values import RotateValues
from pipeline.capture import capture_piece, pieces
from tests.passes.conftest import Whole
from tests.passes.live_bytes import peak_bytes
from tests.passes.lockstep import Values
from tests.passes.rewrites import Feeds, assert_same_logits, on_shapes, values_of
from tests.passes.sketch import Sketch, aten, copy_of, count, ops
from tests.pipeline.random_models import tiny

FAMILIES = ("llada", "dream", "odd")


def rewritten(graph: GraphModule, *edits: Pass) -> tuple[GraphModule, list[int]]:
    made = copy_of(graph)
    return made, list(run(made, edits, check_rewritten).values())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("edits", "counts"),
    [
        ((FoldNorm(), RotateStream(0)), [5, 10]),  # embedding, head, four linears a block; with biases more
        ((RotateValues(0),), [2]),
        ((RotateKeys(0),), [2]),
        ((FoldNorm(), RotateStream(1), RotateValues(1), RotateKeys(1)), [5, 10, 2, 2]),
    ],
)
def test_logits_stay(whole: Whole, feeds: Feeds, family: str, edits: tuple[Pass, ...], counts: list[int]) -> None:
    graph = whole(family)
    made, found = rewritten(graph, *edits)
    assert found == counts
    assert_same_logits(graph, made, feeds)
    shapes, _ = rewritten(on_shapes(graph), *edits)
    assert str(shapes.graph) == str(made.graph)
    assert {n: v.shape for n, v in attributes(shapes).items()} == {n: v.shape for n, v in attributes(made).items()}
    assert all(value.is_meta for value in attributes(shapes).values())


def test_the_stream_turns_one_large_weight_at_a_time() -> None:
    def ends_turned() -> None:
        sketch = Sketch()
        table = sketch.weight("embed", torch.randn(200_000, 64))
        x = sketch(aten.embedding.default, table, sketch.input("ids"))
        norm = sketch(aten.rms_norm.default, x, [64], None, 1e-3)
        graph = sketch.output(sketch.linear(norm, "head", torch.randn(200_000, 64)))
        del sketch  # it holds the weights
        RotateStream(0)(graph)

    assert peak_bytes(ends_turned) <= (2 + 1.2) * 200_000 * 64 * 4


@pytest.mark.parametrize("family", FAMILIES)
def test_the_stream_is_the_model_s_own_turned(whole: Whole, feeds: Feeds, family: str) -> None:
    graph = whole(family)
    made, _ = rewritten(graph, FoldNorm(), RotateStream(7))
    assert count(made, ops.rotate.default) == 0
    before, after = ([node.args[0] for node in calls(g, aten.rms_norm.default)] for g in (graph, made))
    old, new = Values(graph), Values(made)
    old.run(*feeds), new.run(*feeds)
    assert len(before) == 5
    for x, y in zip(before, after, strict=True):
        expected = stream_rotation(old.values[node_of(x)].shape[-1], 7).apply(old.values[node_of(x)])
        assert (new.values[node_of(y)] - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_each_seed_has_its_own_stream(whole: Whole, feeds: Feeds) -> None:
    one, other = (rewritten(whole("llada"), FoldNorm(), RotateStream(seed))[0] for seed in (0, 1))
    assert not torch.equal(attributes(one)["embed.weight"], attributes(other)["embed.weight"])


def test_a_gain_that_is_left_is_refused(whole: Whole) -> None:
    with pytest.raises(ValueError, match=r"blocks\.0\.attn_norm\.weight does not commute"):
        RotateStream(0)(whole("llada"))


def test_a_norm_that_something_else_reads_is_refused(whole: Whole) -> None:
    graph = whole("llada")
    FoldNorm()(graph)
    norm = next(calls(graph, aten.rms_norm.default))
    with graph.graph.inserting_after(norm):
        graph.graph.call_function(aten.neg.default, (norm,))
    with pytest.raises(ValueError, match="besides float linears"):
        RotateStream(0)(graph)


@pytest.mark.parametrize("family", FAMILIES)
def test_values_turn_head_by_head(whole: Whole, feeds: Feeds, family: str) -> None:
    graph = whole(family)
    made, _ = rewritten(graph, RotateValues(0))
    for attention in range(2):
        before, after = (
            values_of(g, aten.scaled_dot_product_attention.default, feeds)[attention] for g in (graph, made)
        )
        # Heads are turned by one rotation: their lengths and their angles to each other stay.
        products = [z[0, :, 0] @ z[0, :, 0].T for z in (before, after)]
        assert (products[0] - products[1]).abs().max() <= 1e-5 * products[0].abs().max()
        assert (before - after).abs().max() >= 0.1 * before.abs().max()


def test_an_attention_behind_something_else_is_refused(whole: Whole) -> None:
    graph = whole("llada")
    flat = next(calls(graph, aten.flatten.using_ints))
    with graph.graph.inserting_after(flat):
        negated = graph.graph.call_function(aten.neg.default, (flat,))
    flat.replace_all_uses_with(negated, delete_user_cb=lambda user: user is not negated)
    with pytest.raises(ValueError, match="does not stand between"):
        RotateValues(0)(graph)


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_and_queries_turn_alike(whole: Whole, feeds: Feeds, family: str) -> None:
    graph = whole(family)
    made, _ = rewritten(graph, RotateKeys(0))
    assert count(made, ops.rotate.default) == 4
    old, new = Values(graph), Values(made)
    old.run(*feeds), new.run(*feeds)
    pairs = zip(*(calls(g, aten.scaled_dot_product_attention.default) for g in (graph, made)), strict=True)
    for layer, (one, other) in enumerate(pairs):
        turn = attributes(made)[f"blocks.{layer}.attn.key_rotation"][0]
        for place in range(2):
            x, y = (seen.values[node_of(n.args[place])] for seen, n in ((old, one), (new, other)))
            assert (y - x @ turn).abs().max() <= 1e-5 * x.abs().max()
        assert one.args[2].name == other.args[2].name  # type: ignore[union-attr]


def test_keys_are_rotated_once(whole: Whole) -> None:
    graph = whole("llada")
    RotateKeys(0)(graph)
    with pytest.raises(ValueError, match="already has a weight"):
        RotateKeys(0)(graph)


def test_pieces_turn_as_the_whole_model_does(whole: Whole) -> None:
    """What a weight becomes is decided by its name, the seed and its own graph's nodes alone."""
    graph, edits = whole("dream"), (FoldNorm(), RotateStream(3), RotateValues(3), RotateKeys(3))
    expected = attributes(rewritten(graph, *edits)[0])
    model = tiny(shifted=True)
    found: dict[str, Tensor] = {}
    for piece in pieces(model.config):
        part = capture_piece(model.config, piece, {name: model.state_dict()[name] for name in piece.weights})
        set_attributes(part, {name: attributes(graph)[name] for name in attributes(part)})
        found |= attributes(rewritten(part, *edits)[0])
    assert found.keys() == expected.keys() - {"rope_frequencies"}
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
