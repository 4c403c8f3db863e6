"""Quantised operands of attention against loops over heads and rows; 16 bits are the attention that was there."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.node import Argument

from passes.base import run
from passes.graph import attributes, is_call, node_of
from passes.invariants import check_float
from passes.methods import METHODS
from passes.quant_spec import AttentionSpec, QuantPlan, QuantSpec
from passes.quantize_attention import ProbScale, QuantizeAttention, quantized_attention, round_probabilities
from pipeline.capture import capture_whole
from plugins.quantize import QUANTIZE
from tests.passes.blocks import block, samples
from tests.passes.sketch import Sketch, assert_untouched, aten, copy_of, count, edited, only, ops
from tests.pipeline.random_models import tiny

SPECS = [
    AttentionSpec(k_bits=4),
    AttentionSpec(v_bits=4),
    AttentionSpec(prob_bits=4),
    AttentionSpec(prob_bits=4, prob_scale="row"),
    AttentionSpec(k_bits=8, v_bits=4, prob_bits=8),
]


def plan_of(spec: AttentionSpec, *, symmetric: bool = True) -> QuantPlan:
    return QuantPlan(linear=QuantSpec(w_bits=4, a_bits=4, symmetric=symmetric), head=None, attention=spec)


def attended(spec: AttentionSpec, symmetric: bool, *given_inputs: Tensor) -> Tensor:
    """What the pass makes of one attention, run."""
    sketch = Sketch()
    nodes = [sketch.input(name) for name in ("q", "k", "v", "visible")]
    graph = sketch.output(sketch(aten.scaled_dot_product_attention.default, *nodes, enable_gqa=True))
    assert run(graph, [QuantizeAttention(plan_of(spec, symmetric=symmetric))], check_float) == {"QuantizeAttention": 1}
    found: Tensor = graph(*given_inputs)
    return found


def drawn(groups: int, repeats: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    visible = torch.ones(2, 1, 5, 5, dtype=torch.bool)
    visible[1, ..., 3:] = False
    q = torch.randn(2, groups * repeats, 5, 8)
    return q, torch.randn(2, groups, 5, 8), torch.randn(2, groups, 5, 8), visible


def plain_row(row: list[float], bits: int, symmetric: bool) -> list[float]:
    """One row on its grid, number by number."""
    if bits == 16:
        return row
    top = 2 ** (bits - 1) - 1
    if symmetric:
        step = max(abs(x) for x in row) / top
        return [step * min(max(round(x / step), -top), top) for x in row]
    high, low = max(*row, 0.0), min(*row, 0.0)
    step = (high - low) / (2 * top)
    zero = round((high + low) / (2 * step))
    return [step * (min(max(round(x / step) - zero, -top), top) + zero) for x in row]


def plain(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, spec: AttentionSpec, symmetric: bool) -> Tensor:
    """Query by query."""
    out = torch.zeros_like(q)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            group = h * k.shape[1] // q.shape[1]
            keys = [plain_row(row, spec.k_bits, symmetric) for row in k[b, group].tolist()]
            values = torch.tensor([plain_row(row, spec.v_bits, symmetric) for row in v[b, group].tolist()])
            for i, query in enumerate(q[b, h]):
                seen = [s for s in range(len(keys)) if visible[b, 0, i, s]]
                scores = torch.stack([query.double() @ torch.tensor(keys[s]).double() / 8**0.5 for s in seen])
                p = [0.0] * len(keys)
                for s, value in zip(seen, scores.softmax(0).tolist(), strict=True):
                    p[s] = value
                if spec.prob_bits < 16 and spec.prob_scale == "unit":
                    steps = 2**spec.prob_bits - 1
                    p = [round(value * steps) / steps for value in p]
                elif spec.prob_bits < 16:
                    p = plain_row(p, spec.prob_bits, symmetric=False)
                out[b, h, i] = torch.tensor(p) @ values
    return out


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize(("groups", "repeats", "symmetric"), [(2, 1, True), (2, 3, False), (1, 4, True)])
def test_equals_loops(spec: AttentionSpec, groups: int, repeats: int, symmetric: bool) -> None:
    given_inputs = drawn(groups, repeats)
    found = attended(spec, symmetric, *given_inputs)
    wanted = plain(*given_inputs, spec, symmetric)
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_sixteen_bits_are_attention_itself() -> None:
    q, k, v, visible = drawn(2, 3)
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True)
    assert torch.equal(quantized_attention(q, k, v, visible), wanted)
    # The explicit softmax at so many levels that rounding vanishes.
    fine = quantized_attention(q, k, v, visible, prob_bits=15)
    assert (fine - wanted).abs().max() <= 5 * 2.0**-15 * v.abs().max()


@given(st.integers(1, 12), st.sampled_from([4, 8]), st.sampled_from(["unit", "row"]))
def test_probabilities_stay_in_their_range(size: int, bits: int, scale: ProbScale) -> None:
    p = (4 * torch.randn(20, size, generator=torch.Generator().manual_seed(size))).softmax(-1)
    p[:, size // 2 + 1 :] = 0
    found = round_probabilities(p, bits, scale)
    assert bool((found[p == 0] == 0).all())  # a slot that is not visible adds nothing
    step = 1 / (2**bits - 1) if scale == "unit" else p.amax(-1, keepdim=True) / (2**bits - 2)
    assert bool(((found - p).abs() <= step / 2 * (1 + 1e-5)).all())
    assert float(found.min()) >= 0
    assert float(found.max()) <= 1 + 1e-6


def source_of(stored: Argument, bits: int) -> Argument:
    """What was quantised."""
    assert is_call(stored, ops.dequantize_rows.default)
    codes, _, _, stored_bits = node_of(stored).args
    codes = node_of(codes).args[0] if is_call(codes, ops.pack.default) else codes
    x, *_ = (quantize := node_of(node_of(codes).args[0])).args
    assert is_call(quantize, ops.quantize.default)
    assert QUANTIZE.arguments(*quantize.args)["bits"] == stored_bits == bits
    return x


@pytest.mark.parametrize("spec", [AttentionSpec(k_bits=8), AttentionSpec(v_bits=4)], ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
def test_keys_and_values_alone_leave_the_attention_that_was_there(spec: AttentionSpec, symmetric: bool) -> None:
    """With operands that are what `fake_quant` makes of them, bit for bit."""
    q, k, v, visible = drawn(2, 2)
    rounded = [
        x if bits == 16 else ops.fake_quant(x, bits, symmetric) for x, bits in ((k, spec.k_bits), (v, spec.v_bits))
    ]
    wanted = torch.nn.functional.scaled_dot_product_attention(q, *rounded, attn_mask=visible, enable_gqa=True)
    assert torch.equal(attended(spec, symmetric, q, k, v, visible), wanted)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_attention_of_a_graph(kv_heads: int, symmetric: bool) -> None:
    graph, spec = block(kv_heads=kv_heads), SPECS[-1]
    plain_graph = copy_of(graph)
    assert run(graph, [QuantizeAttention(plan_of(spec, symmetric=symmetric))], check_float) == {"QuantizeAttention": 1}
    assert count(graph, aten.scaled_dot_product_attention.default) == 0
    for batch in samples(2):
        assert not torch.equal(graph(*batch.inputs), plain_graph(*batch.inputs))
        assert bool(graph(*batch.inputs).isfinite().all())
    node, old = only(graph, quantized_attention), only(plain_graph, aten.scaled_dot_product_attention.default)
    q, k, v, visible = node.args[:4]
    assert node.args[4:] == (spec.prob_bits, spec.prob_scale)
    sources = [q, *(source_of(stored, bits) for stored, bits in ((k, spec.k_bits), (v, spec.v_bits))), visible]
    assert list(map(str, sources)) == list(map(str, old.args))
    assert count(graph, ops.pack.default) == 1  # of values, at 4 bits


def test_sixteen_bits_touch_nothing() -> None:
    assert_untouched(block(), QuantizeAttention(plan_of(AttentionSpec())))


def test_methods_end_with_it_when_asked() -> None:
    for spec in (AttentionSpec(), *SPECS):
        names = [type(each).__name__ for each in METHODS["rtn"].passes(plan_of(spec))]
        assert ("QuantizeAttention" in names) is (spec != AttentionSpec())
        assert spec.is_float is (spec == AttentionSpec())


def test_shapes_alone() -> None:
    whole = capture_whole(tiny(shifted=True).config, top_k=4)
    before = dict(attributes(whole))
    found, counts = edited(whole, QuantizeAttention(plan_of(SPECS[-1])))
    assert counts == [2]
    assert attributes(found) == before


def test_no_linear_format_means_symmetric() -> None:
    plan = replace(plan_of(SPECS[0], symmetric=False), linear=None)
    assert QuantizeAttention(plan).symmetric


def test_an_attention_of_another_kind_is_refused() -> None:
    sketch = Sketch()
    q, k, v = (sketch.input(name) for name in "qkv")
    graph = sketch.output(sketch(aten.scaled_dot_product_attention.default, q, k, v, None, 0.0, True))
    with pytest.raises(ValueError, match="causal mask"):
        QuantizeAttention(plan_of(SPECS[0]))(graph)
