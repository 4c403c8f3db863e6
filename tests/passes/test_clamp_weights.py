"""Weights saturate where their ratio says, so that any solver's grid ends there."""

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from passes.clamp_weights import ClampWeights
from passes.fit import Fit
from passes.graph import attributes
from passes.quant_spec import QuantPlan, QuantSpec
from passes.solvers.draws import generator
from passes.solvers.nearest import round_to_nearest
from tests.passes.sketch import Sketch, assert_untouched, edited

SITE, OTHER = "a.o_proj", "a.down_proj"


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator(0, str(shape)))


def two_linears() -> GraphModule:
    sketch = Sketch()
    return sketch.output(sketch.linear(sketch.linear(sketch.input("x"), SITE, drawn(6, 8)), OTHER, drawn(8, 6)))


def plan(group: int, *skip: str) -> QuantPlan:
    return QuantPlan(linear=QuantSpec(w_bits=4, a_bits=4, w_group=group), head=None, skip=skip)


@pytest.mark.parametrize("group", [0, 4])
def test_the_largest_code_stands_for_the_ratio(group: int) -> None:
    graph = two_linears()
    ratios = 0.3 + 0.7 * torch.rand(6, 2 if group else 1, generator=generator(1))
    clamped, counts = edited(graph, ClampWeights(plan(group), Fit(tensors={f"{SITE}.w_clip": ratios})))
    assert counts == [1]
    before, after = attributes(graph), attributes(clamped)
    assert torch.equal(after[f"{OTHER}.weight"], before[f"{OTHER}.weight"])
    found = round_to_nearest(after[f"{SITE}.weight"], bits=4, group=group)
    expected = round_to_nearest(before[f"{SITE}.weight"], bits=4, group=group, clip=ratios)
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.scale, expected.scale)
    for row, (old, new) in enumerate(zip(before[f"{SITE}.weight"], after[f"{SITE}.weight"], strict=True)):
        for column, (value, changed) in enumerate(zip(old, new, strict=True)):
            place = column // group if group else 0
            part = old[place * group : (place + 1) * group] if group else old
            limit = float(part.abs().max() * ratios[row, place])
            assert float(changed) == max(-limit, min(limit, float(value)))


def test_without_ratios_or_outside_the_plan_nothing_changes() -> None:
    assert_untouched(two_linears(), ClampWeights(plan(0), Fit()))
    kept = Fit(tensors={f"{SITE}.w_clip": torch.full((6, 1), 0.5)})
    assert_untouched(two_linears(), ClampWeights(plan(0, "*.o_proj"), kept))
