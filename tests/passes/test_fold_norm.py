"""A norm's gain moves into the linears after it; the output stays what it was."""

import torch
from torch.fx import GraphModule

from passes.fold_norm import FoldNorm
from passes.graph import attributes
from tests.passes.live_bytes import peak_bytes
from tests.passes.sketch import Sketch, assert_untouched, aten, copy_of, edited

K = 16
GAIN = torch.tensor([0.5, 2.0, 1.0, 4.0]).repeat(K // 4)  # powers of two: folding them rounds nothing


def normed(*, other: bool = False, shared_gain: bool = False, gain: bool = True) -> GraphModule:
    sketch = Sketch()
    x = sketch.input("x")
    weight = sketch.weight("norm.weight", GAIN) if gain else None
    norm = sketch(aten.rms_norm.default, x, [K], weight, 1e-3)
    draw = torch.Generator().manual_seed(0)
    results = [sketch.linear(norm, f"a.{s}_proj", torch.randn(8, K, generator=draw)) for s in ("q", "k")]
    if other:
        results.append(sketch(aten.neg.default, norm))
    if shared_gain:
        results.append(sketch(aten.rms_norm.default, x, [K], weight, 1e-3))
    return sketch.output(*results)


def test_the_gain_moves_into_every_linear_and_nothing_changes() -> None:
    graph = normed()
    folded, counts = edited(graph, FoldNorm())
    assert counts == [1]
    before, after = attributes(graph), attributes(folded)
    assert torch.equal(after["norm.weight"], torch.ones(K))
    for site in ("a.q_proj.weight", "a.k_proj.weight"):
        assert torch.equal(after[site], before[site] * GAIN)
    x = torch.randn(3, 5, K)
    for found, expected in zip(folded(x), graph(x), strict=True):
        # The products are the same powers-of-two multiples; only the order of the sums may differ.
        assert (found - expected).abs().max() <= K * 2.0**-24 * expected.abs().max()


def test_one_weight_at_a_time_is_there_twice() -> None:
    def three_folded() -> None:
        sketch = Sketch()
        norm = sketch(aten.rms_norm.default, sketch.input("x"), [K], sketch.weight("norm.weight", GAIN), 1e-3)
        linears = [sketch.linear(norm, f"a.{site}_proj", torch.randn(50_000, K)) for site in "qkv"]
        graph = sketch.output(*linears)
        del sketch  # it holds the weights
        FoldNorm()(graph)

    assert peak_bytes(three_folded) <= (3 + 1.2) * 50_000 * K * 4


def test_a_second_run_changes_no_value() -> None:
    once, _ = edited(normed(), FoldNorm())
    twice, _ = edited(copy_of(once), FoldNorm())
    assert all(torch.equal(value, attributes(twice)[name]) for name, value in attributes(once).items())


def test_a_norm_that_something_else_reads_stays() -> None:
    assert_untouched(normed(other=True), FoldNorm())


def test_a_gain_that_two_norms_share_stays() -> None:
    assert_untouched(normed(shared_gain=True), FoldNorm())


def test_a_norm_without_gain_stays() -> None:
    assert_untouched(normed(gain=False), FoldNorm())


def test_whole_models_keep_their_logits(whole, feeds) -> None:  # type: ignore[no-untyped-def]
    graph = whole("dream")
    expected = graph(*feeds)
    folded, counts = edited(graph, FoldNorm())
    assert counts == [5]  # two a block, and the final norm before the head
    for name, found, wanted in zip(("ids", "logits"), folded(*feeds), expected, strict=False):
        if name == "logits":
            assert (found - wanted).abs().max() <= 1e-5 * wanted.abs()[wanted.abs() < 1e8].max()
