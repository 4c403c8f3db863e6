"""One ratio for every linear whose activations are quantised, found again where they are."""

import torch
from torch.fx import GraphModule

from passes.clip_activations import ClipActivations
from passes.fit import Fit
from passes.insert_fake_quant import InsertFakeQuant
from passes.quant_spec import QuantPlan, QuantSpec
from tests.passes.sketch import Sketch, calls, copy_of, ops

SITES = ("blocks.0.attn.o_proj", "blocks.0.mlp.down_proj")


def two_linears() -> GraphModule:
    sketch = Sketch()
    x = sketch.input("x")
    for site in SITES:
        x = sketch.linear(x, site, torch.randn(4, 4))
    return sketch.output(x)


def test_the_ratio_reaches_the_quantisers() -> None:
    graph, fit = two_linears(), Fit()
    plan = QuantPlan(linear=QuantSpec(w_bits=4, a_bits=4, symmetric=False), head=None)
    assert ClipActivations(plan, fit, 0.9)(graph) == 2
    assert set(fit.numbers.values()) == {0.9}
    InsertFakeQuant(plan, fit.numbers)(graph)
    assert [node.args[4:] for node in calls(graph, ops.fake_quant.default)] == [(0.9, 0.9)] * 2


def test_only_what_the_plan_quantises() -> None:
    fit, spec = Fit(), QuantSpec(w_bits=4, a_bits=4)
    assert ClipActivations(QuantPlan(linear=spec, head=None, skip=("*.o_proj",)), fit, 0.9)(two_linears()) == 1
    assert set(fit.numbers) == {f"{SITES[1]}.clip_lo", f"{SITES[1]}.clip_hi"}
    assert ClipActivations(QuantPlan(linear=QuantSpec(w_bits=4), head=None), fit, 0.9)(copy_of(two_linears())) == 0
