"""Hessians against a loop over rows, on the graph as it is, and inputs from which there is none."""

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from passes import hessians
from passes.fit import Batch, CalibrationError
from passes.graph import attributes, calls, node_of, site_of
from passes.hessians import hessian, input_graph
from passes.observe import Observed
from passes.quant_spec import QuantPlan, QuantSpec
from passes.quantize_weights import QuantizeWeights, nearest
from tests.passes.blocks import SITES, block, samples
from tests.passes.samples import Listed
from tests.passes.sketch import aten


def linear_at(graph: GraphModule, site: str) -> Node:
    (found,) = (linear for linear in calls(graph, aten.linear.default) if site_of(linear) == site)
    return found


def textbook(graph: GraphModule, site: str, batches: Listed, weights: list[Tensor] | None = None) -> Tensor:
    """Sum of w x x^T, row by row in float64."""
    total: Tensor | float = 0.0
    for number, batch in enumerate(batches):
        seen: dict[str, Tensor] = {}
        Observed(graph, lambda at, x, y, seen=seen: seen.__setitem__(at, x)).run(*batch.inputs)
        for b in range(len(batch.valid)):
            for q in range(batch.valid.shape[1]):
                if batch.valid[b, q]:
                    weight = 1.0 if weights is None else float(weights[number][b, q])
                    row = seen[site][b, q].double()
                    total = total + weight * torch.outer(row, row)
    assert isinstance(total, Tensor)
    return total


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == torch.float32
    # Sums of some 50 products in float32, in another order.
    bound = 64 * 2**-24 * expected.diagonal().sqrt().outer(expected.diagonal().sqrt())
    assert bool(((found - expected).abs() <= bound).all())


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("site", SITES)
def test_equals_the_sum_over_valid_rows(site: str, quantised: bool) -> None:
    torch.manual_seed(1)
    graph, batches = block(), samples(5)
    plain = hessian(graph, linear_at(graph, site), batches)
    if quantised:
        plan = QuantPlan(linear=QuantSpec(w_bits=3), head=None, skip=(site,))
        QuantizeWeights(plan, nearest)(graph)
        graph.recompile()
    found = hessian(graph, linear_at(graph, site), batches)
    assert_close(found, textbook(graph, site, batches))
    assert torch.equal(found, plain) == (not quantised or site == SITES[0])


@pytest.mark.parametrize("strip", [5, 16, 32])
def test_strips_make_the_whole_matrix(strip: int, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, batches = block(), samples(4)
    monkeypatch.setattr(hessians, "STRIP", strip)
    found = hessian(graph, linear_at(graph, SITES[3]), batches)
    assert_close(found, textbook(graph, SITES[3], batches))


def test_rows_count_as_much_as_they_weigh() -> None:
    graph, batches = block(), samples(4)
    weights = [torch.rand(batch.valid.shape) for batch in batches]
    weights[0][0] = 0

    def weigh(batch: Batch) -> Tensor:
        return weights[batch.first // 2]

    found = hessian(graph, linear_at(graph, SITES[3]), batches, weigh)
    assert_close(found, textbook(graph, SITES[3], batches, weights))


def test_only_what_leads_to_the_input_is_computed() -> None:
    graph = block()
    parts = {site: input_graph(graph, linear_at(graph, site)) for site in SITES}
    counts = [len(list(calls(part, aten.linear.default))) for part in parts.values()]
    assert counts == [0, 1, 2, 3]
    assert "blocks.0.attn.q_k_v_proj.weight" not in attributes(parts[SITES[0]])
    shared = attributes(parts[SITES[1]])["blocks.0.attn.q_k_v_proj.weight"]
    assert shared is attributes(graph)["blocks.0.attn.q_k_v_proj.weight"]
    assert len(list(calls(graph, aten.linear.default))) == 4


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_an_input_that_is_not_finite_is_refused_by_site_and_sample(value: float) -> None:
    graph, batches = block(), samples(6)
    batch = batches.batches[1]
    batch.inputs[0][1, 0, 3] = value
    with pytest.raises(CalibrationError, match=rf"^the input of {SITES[0]} has .* not finite in .* sample 3;"):
        hessian(graph, linear_at(graph, SITES[0]), batches)


def test_padding_may_hold_anything() -> None:
    graph, batches = block(), samples(2)
    expected = hessian(graph, linear_at(graph, SITES[0]), batches)
    batches.batches[0].inputs[0][1, -2:] = torch.nan
    assert torch.equal(hessian(graph, linear_at(graph, SITES[0]), batches), expected)


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("value", [0.0, 2.5])
def test_a_sample_of_one_value_is_refused_by_site(site: str, value: float) -> None:
    """Also where all other samples differ, and whatever padding holds."""
    graph, batches = block(), samples(6)
    source = node_of(linear_at(graph, site).args[0])
    with graph.graph.inserting_after(source):
        # The third sample's rows become one value at this linear alone.
        spoilt = graph.graph.call_function(one_value, (source, graph_input(graph), value))
    linear_at(graph, site).replace_input_with(source, spoilt)
    graph.recompile()
    batches.batches[1].inputs[4][0] = 7
    with pytest.raises(CalibrationError, match=rf"^the input of {site} is {value:g} everywhere in .* sample 2;"):
        hessian(graph, linear_at(graph, site), batches)


def one_value(x: Tensor, marked: Tensor, value: float) -> Tensor:
    return torch.where(marked[..., None] == 7, value, x)


def graph_input(graph: GraphModule) -> Node:
    """The placeholder of mask states, which nothing else reads here."""
    return node_of([node for node in graph.graph.nodes if node.op == "placeholder"][4])


def test_inputs_that_count_for_nothing_are_refused() -> None:
    graph, batches = block(), samples(2)
    with pytest.raises(CalibrationError, match=r"^inputs of blocks\.0\.attn\.q_k_v_proj are too small"):
        hessian(graph, linear_at(graph, SITES[0]), batches, lambda batch: torch.zeros(batch.valid.shape))


def test_inputs_whose_squares_overflow_are_refused() -> None:
    graph, batches = block(), samples(2)
    attributes(graph)["blocks.0.attn_norm.weight"].fill_(1e25)
    with pytest.raises(CalibrationError, match=r"inputs of blocks\.0\.attn\.q_k_v_proj are too large"):
        hessian(graph, linear_at(graph, SITES[0]), batches)
