"""SmoothQuant on a block: the textbook scale at every site, the function as it was, what is not its own left alone."""

from dataclasses import replace

import pytest
import torch

from passes.base import run
from passes.fit import Fit
from passes.graph import attributes
from passes.invariants import check_float
from passes.magnitudes import magnitudes
from passes.quant_spec import QuantPlan, QuantSpec
from passes.smooth_scales import SmoothScales
from tests.passes.blocks import SITES, block, samples
from tests.passes.sketch import assert_untouched, copy_of
from tests.passes.test_magnitudes import all_inputs

PLAN = QuantPlan(linear=QuantSpec(w_bits=4, a_bits=4), head=None)
REPEATS = {1: 4, 2: 2, 4: 1}


@pytest.mark.parametrize(("kv_heads", "alpha"), [(1, 0.5), (2, 0.8), (4, 0.5)])
def test_scales_are_the_formula_s(kv_heads: int, alpha: float) -> None:
    graph, given = block(kv_heads=kv_heads), samples()
    before, rows = dict(attributes(graph)), all_inputs(graph, given)
    assert run(graph, [SmoothScales(PLAN, Fit(samples=given), alpha=alpha)], check_float) == {"SmoothScales": 4}
    after = attributes(graph)
    for site in SITES:
        weight = before[f"{site}.weight"]
        x_max, w_max = (
            torch.tensor([float(column.abs().max()) for column in table.T]) for table in (rows[site], weight)
        )
        if site.endswith("o_proj"):  # query heads of one group read the same rows of v
            x_max, w_max = (
                v.reshape(kv_heads, -1, 8).amax(1, keepdim=True).expand(-1, REPEATS[kv_heads], -1).flatten()
                for v in (x_max, w_max)
            )
        scale = x_max**alpha / w_max ** (1 - alpha)
        # Rows of this weight may have been divided for the site after it: one factor a row.
        ratio = after[f"{site}.weight"] / weight
        ratio = ratio[0] if "gate_up" not in site else ratio[0::2].mean(0)
        assert torch.allclose(ratio, scale, rtol=1e-4), site


@pytest.mark.parametrize(("kv_heads", "bias"), [(1, True), (2, False), (2, True)])
def test_the_function_stays(kv_heads: int, bias: bool) -> None:
    graph, given = block(kv_heads=kv_heads, bias=bias), samples()
    smooth = copy_of(graph)
    SmoothScales(PLAN, Fit(samples=given), alpha=0.5)(smooth)
    for batch in given:
        wanted, found = graph(*batch.inputs), smooth(*batch.inputs)
        assert (found - wanted)[batch.valid].abs().max() <= 1e-5 * wanted[batch.valid].abs().max()


def test_loud_channels_become_quiet() -> None:
    graph, given = block(kv_heads=4), samples(loud=30.0)
    before = magnitudes(graph, given)
    SmoothScales(PLAN, Fit(samples=given), alpha=0.5)(graph)
    after, weights = magnitudes(graph, given), attributes(graph)
    for site in SITES:
        spread = [float(each[site].amax.max() / each[site].amax.median()) for each in (before, after)]
        assert spread[1] < spread[0], site
    for site in (SITES[1], SITES[3]):  # nothing divides their rows later: both sides are equally hard
        assert torch.allclose(after[site].amax, weights[f"{site}.weight"].abs().amax(0), rtol=1e-4)


def test_sites_at_16_bits_are_left_alone() -> None:
    graph, given = block(), samples()
    before = dict(attributes(graph))
    plan = replace(PLAN, skip=("*.o_proj", "*.down_proj"))
    assert SmoothScales(plan, Fit(samples=given), alpha=0.5)(graph) == 2
    assert all(torch.equal(attributes(graph)[f"{site}.weight"], before[f"{site}.weight"]) for site in SITES[1::2])


def test_nothing_to_do_needs_no_samples() -> None:
    assert_untouched(block(), SmoothScales(replace(PLAN, linear=None), Fit(), alpha=0.5))
    with pytest.raises(ValueError, match="there are no samples"):
        SmoothScales(PLAN, Fit(), alpha=0.5)(block())
