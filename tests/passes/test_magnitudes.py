"""Magnitudes and sample rows against all inputs side by side; padding never counts, batches do not matter."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from passes.fit import CalibrationError, Fit
from passes.magnitudes import largest_rows, linears_at_hand, magnitudes, needed, sample_rows
from passes.observe import Observed
from passes.quant_spec import QuantPlan, QuantSpec
from pipeline.capture import capture_whole
from tests.passes.blocks import ROWS, SITES, block, samples
from tests.passes.samples import Listed, listed
from tests.passes.sketch import Sketch
from tests.pipeline.random_models import tiny

PLAN = QuantPlan(linear=QuantSpec(w_bits=4), head=QuantSpec(w_bits=8, a_bits=8))


def all_inputs(graph: GraphModule, given: Listed) -> dict[str, Tensor]:
    """Every valid row of every site, in order."""
    found: dict[str, list[Tensor]] = {}
    for batch in given:
        for row in range(len(batch.valid)):
            number, kept = row, batch.valid[row]

            def watch(site: str, x: Tensor, _: Tensor, number: int = number, kept: Tensor = kept) -> None:
                found.setdefault(site, []).append(x[number][kept])

            Observed(graph, watch).run(*batch.inputs)
    return {site: torch.cat(parts) for site, parts in found.items()}


def rebatched(batch: int) -> Listed:
    torch.manual_seed(5)
    return samples(7, batch=batch)


def test_of_every_site_over_valid_rows() -> None:
    graph, given = block(), samples()
    wanted, found = all_inputs(graph, given), magnitudes(graph, given)
    assert set(found) == set(wanted) == set(SITES)
    for site, rows in wanted.items():
        assert len(rows) == 6 * ROWS - 3 * 2
        assert torch.allclose(found[site].amax, rows.abs().amax(0), rtol=1e-5)
        assert torch.allclose(found[site].mean, rows.abs().mean(0), rtol=1e-5)


@pytest.mark.parametrize("limit", [1, 10, 50, 1000])
def test_rows_are_inputs_and_no_padding(limit: int) -> None:
    graph, given = block(), samples()
    wanted, found = all_inputs(graph, given), sample_rows(graph, given, limit=limit, seed=0)
    chosen: list[list[int]] = []
    for site, rows in wanted.items():
        assert len(found[site]) == min(limit, len(rows))
        places = torch.cdist(found[site].double(), rows.double()).argmin(1)
        assert (found[site] - rows[places]).abs().max() <= 1e-4
        chosen.append(places.tolist())
    assert chosen[0] == sorted(set(chosen[0]))  # in order, none twice
    assert all(places == chosen[0] for places in chosen)  # the same rows of every site


def test_other_seeds_draw_other_rows() -> None:
    graph, given = block(), samples()
    one, same, other = (sample_rows(graph, given, limit=10, seed=seed)[SITES[0]] for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_any_batch_size_gives_the_same() -> None:
    graph = block()
    one, three = (magnitudes(graph, rebatched(batch)) for batch in (1, 3))
    rows = [sample_rows(graph, rebatched(batch), limit=20, seed=4) for batch in (1, 3)]
    for site in SITES:
        assert torch.allclose(rows[0][site], rows[1][site], rtol=1e-4, atol=1e-5)
        assert torch.allclose(one[site].mean, three[site].mean, rtol=1e-5)
        assert torch.allclose(one[site].amax, three[site].amax, rtol=1e-5)


def test_input_that_is_not_finite_is_named() -> None:
    graph, given = block(), samples(6, batch=2)
    given.batches[1].inputs[0][1, 3, 5] = torch.nan
    for measure in (magnitudes, lambda *both: sample_rows(*both, limit=3, seed=0)):
        with pytest.raises(
            CalibrationError,
            match=r"^the input of blocks\.0\.attn\.q_k_v_proj has .* not finite in calibration sample 3;",
        ):
            measure(graph, given)


def test_a_sample_of_zeros_is_named() -> None:
    graph, given = block(), samples(6, batch=2)
    given.batches[1].inputs[0][1] = 0.0
    for measure in (magnitudes, lambda *both: sample_rows(*both, limit=3, seed=0)):
        with pytest.raises(CalibrationError, match=rf"^the input of {SITES[0]} is 0 everywhere in .* sample 3;"):
            measure(graph, given)


def test_padding_may_hold_anything() -> None:
    graph, given = block(), samples()
    wanted = magnitudes(graph, given)
    for batch in given:
        batch.inputs[0][~batch.valid] *= -1e4
    found = magnitudes(graph, given)
    assert all(torch.allclose(found[site].amax, wanted[site].amax, rtol=1e-5) for site in SITES)


def test_padding_need_not_be_finite() -> None:
    sketch = Sketch()
    graph = sketch.output(sketch.linear(sketch.input("x"), "site", torch.randn(3, 4)))
    x = torch.randn(2, 5, 4)
    x[:, -1] = torch.inf
    given = listed((x,), padding=1)
    assert torch.equal(magnitudes(graph, given)["site"].amax, x[:, :4].abs().amax((0, 1)))
    assert bool(sample_rows(graph, given, limit=99, seed=0)["site"].isfinite().all())


def test_linears_at_hand_are_those_of_the_plan() -> None:
    graph = block()
    assert tuple(linears_at_hand(graph, PLAN)) == SITES
    assert tuple(linears_at_hand(graph, replace(PLAN, skip=("*.mlp.*",)))) == SITES[:2]
    assert linears_at_hand(graph, replace(PLAN, linear=None)) == {}
    assert linears_at_hand(capture_whole(tiny(shifted=True).config, top_k=4), PLAN) == {}


def test_head_is_left_to_others(whole) -> None:  # type: ignore[no-untyped-def]
    assert "head" not in linears_at_hand(whole("dream"), PLAN)


def test_no_samples_is_an_error() -> None:
    with pytest.raises(ValueError, match="there are no samples"):
        needed(Fit())


def test_the_largest_rows_are_kept_in_order() -> None:
    sketch = Sketch()
    graph = sketch.output(sketch.linear(sketch.input("x"), "a.o_proj", torch.ones(1, 1)))
    batches = ([5.0, -9.0, 1.0, 99.0], [7.0, 2.0, 5.0, 99.0])
    given = listed(*((torch.tensor(batch)[None, :, None],) for batch in batches), padding=1)
    assert largest_rows(graph, given, limit=3)["a.o_proj"].flatten().tolist() == [5.0, -9.0, 7.0]
    assert largest_rows(graph, given, limit=9)["a.o_proj"].flatten().tolist() == [5.0, -9.0, 1.0, 7.0, 2.0, 5.0]
