"""The watcher sees every linear in order, with what enters and leaves it; the result is the graph's own."""

import torch
from torch import Tensor
from torch.fx import GraphModule

from passes.insert_fake_quant import InsertFakeQuant
from passes.observe import Observed
from passes.quant_spec import QuantPlan, QuantSpec
from passes.store_half import StoreHalf
from plugins.fake_quant import fake_quant
from tests.passes.sketch import Sketch, aten, edited


def three_linears() -> GraphModule:
    sketch = Sketch()
    x = sketch.input("x")
    q, k = (sketch.linear(x, f"attn.{name}_proj", torch.randn(6, 4)) for name in "qk")
    return sketch.output(sketch.linear(sketch(aten.mul.Tensor, q, k), "attn.o_proj", torch.randn(4, 6), torch.ones(4)))


def observe(graph: GraphModule, x: Tensor) -> tuple[Tensor, list[tuple[str, Tensor, Tensor]]]:
    seen: list[tuple[str, Tensor, Tensor]] = []
    result = Observed(graph, lambda *what: seen.append(what)).run(x)
    return result, seen


def test_inputs_and_outputs_of_linears_in_order() -> None:
    graph, x = three_linears(), torch.randn(2, 3, 4)
    result, seen = observe(graph, x)
    assert [site for site, _, _ in seen] == ["attn.q_proj", "attn.k_proj", "attn.o_proj"]
    assert torch.equal(seen[0][1], x)
    assert torch.equal(seen[1][1], x)
    assert torch.equal(seen[2][1], seen[0][2] * seen[1][2])
    assert torch.equal(seen[2][2], result)
    assert torch.equal(result, graph(x))


def test_weights_in_half_keep_their_names() -> None:
    stored, _ = edited(three_linears(), StoreHalf())
    _, seen = observe(stored, torch.randn(2, 4))
    assert [site for site, _, _ in seen] == ["attn.q_proj", "attn.k_proj", "attn.o_proj"]


def test_a_simulated_quantiser_shows_the_rounded_input() -> None:
    plan = QuantPlan(linear=QuantSpec(w_bits=4, a_bits=4), head=None)
    graph, _ = edited(three_linears(), InsertFakeQuant(plan))
    x = torch.randn(2, 4)
    _, seen = observe(graph, x)
    assert torch.equal(seen[0][1], fake_quant(x, 4))


def test_a_graph_without_linears_shows_nothing() -> None:
    sketch = Sketch()
    result, seen = observe(sketch.output(sketch(aten.neg.default, sketch.input("x"))), torch.ones(2))
    assert seen == []
    assert torch.equal(result, -torch.ones(2))
