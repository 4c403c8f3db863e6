"""Simulated activations: once for each input and format, exactly the quantiser's values."""

import torch
import torch.nn.functional as F

from passes.graph import attributes
from passes.insert_fake_quant import InsertFakeQuant
from passes.quant_spec import QuantPlan, QuantSpec
from plugins.fake_quant import fake_quant
from tests.passes.sketch import Sketch, assert_untouched, aten, count, edited, only, ops

SPEC = QuantSpec(w_bits=4, a_bits=4, a_group=4, symmetric=False)


def two_of_one_input() -> torch.fx.GraphModule:
    sketch = Sketch()
    x, z = sketch.input("x"), sketch.input("z")
    down = sketch.linear(x, "mlp.down_proj", torch.randn(8, 8), torch.randn(8))
    head = sketch.linear(x, "head", torch.randn(4, 8))
    return sketch.output(sketch(aten.add.Tensor, down, z), head)


def test_an_input_shared_in_one_format_is_quantised_once() -> None:
    graph = two_of_one_input()
    done, counts = edited(graph, InsertFakeQuant(QuantPlan(linear=SPEC, head=SPEC)))
    assert counts == [2]
    assert only(done, ops.fake_quant.default).args[1:] == (4, False, 4, 1.0, 1.0)
    assert count(done, aten.linear.default) == 2
    x, z = torch.randn(3, 8), torch.randn(3, 8)
    rounded, weights = fake_quant(x, 4, False, 4), attributes(graph)
    down, head = done(x, z)
    assert torch.equal(down, F.linear(rounded, weights["mlp.down_proj.weight"], weights["mlp.down_proj.bias"]) + z)
    assert torch.equal(head, F.linear(rounded, weights["head.weight"]))


def test_two_formats_of_one_input_are_two_nodes() -> None:
    head = QuantSpec(w_bits=8, a_bits=8)
    done, counts = edited(two_of_one_input(), InsertFakeQuant(QuantPlan(linear=SPEC, head=head)))
    assert counts == [2]
    assert count(done, ops.fake_quant.default) == 2


def test_a_skipped_linear_reads_the_float_input() -> None:
    graph = two_of_one_input()
    done, counts = edited(graph, InsertFakeQuant(QuantPlan(linear=SPEC, head=SPEC, skip=("mlp.*",))))
    assert counts == [1]
    x, z = torch.randn(3, 8), torch.randn(3, 8)
    assert torch.equal(done(x, z)[0], graph(x, z)[0])
    assert not torch.equal(done(x, z)[1], graph(x, z)[1])


def test_float_activations_change_nothing() -> None:
    weights_only = QuantSpec(w_bits=4, a_bits=16)
    assert_untouched(two_of_one_input(), InsertFakeQuant(QuantPlan(linear=weights_only, head=None)))


def test_a_quantised_input_is_not_quantised_again() -> None:
    edit = InsertFakeQuant(QuantPlan(linear=SPEC, head=SPEC))
    done, _ = edited(two_of_one_input(), edit)
    assert_untouched(done, edit)
