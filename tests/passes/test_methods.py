"""Methods: which passes run, what they leave of a whole graph, and that switched off they change no value."""

import pytest
import torch
from torch import Tensor

from passes.base import run
from passes.graph import attributes, calls, site_of
from passes.invariants import check_quantized
from passes.methods import METHODS
from passes.quant_spec import QuantPlan, QuantSpec
from passes.solvers.nearest import round_to_nearest
from tests.passes.conftest import Whole
from tests.passes.sketch import aten, count, ops

OFF = QuantPlan(linear=None, head=None)
SITES = [
    *(f"blocks.{i}.{site}" for i in range(2) for site in ("attn.q_k_v_proj", "attn.o_proj", "mlp.gate_up_proj")),
    *(f"blocks.{i}.mlp.down_proj" for i in range(2)),
    "head",
]


UNCALIBRATED = [name for name, method in METHODS.items() if not method.needs_calibration]


def test_table() -> None:
    assert all(method.name == name and method.summary and method.formats for name, method in METHODS.items())
    assert UNCALIBRATED == ["none", "rtn"]


@pytest.mark.parametrize("family", ["llada", "dream"])
@pytest.mark.parametrize("name", UNCALIBRATED)
def test_switched_off_changes_no_value(whole: Whole, feeds: tuple[Tensor, ...], name: str, family: str) -> None:
    """Weights that are halves already are stored without loss, so every output is the same to the bit."""
    graph = whole(family)
    for weight in attributes(graph).values():
        if weight.ndim == 2:
            weight.data.copy_(weight.half())
    expected = graph(*feeds)
    changed = run(graph, METHODS[name].passes(OFF), check_quantized)
    assert {key: value for key, value in changed.items() if value} == {"StoreHalf": 10}
    for found, value in zip(graph(*feeds), expected, strict=True):
        assert torch.equal(found, value)


def test_none_stores_the_embedding_as_asked(whole: Whole) -> None:
    graph = whole("llada")
    plan = QuantPlan(linear=None, head=None, embedding_bits=8)
    run(graph, METHODS["none"].passes(plan), check_quantized)
    assert count(graph, ops.dequantize.default) == count(graph, ops.fake_quant.default) == 0
    assert attributes(graph)["embed.codes"].dtype == torch.int8
    assert "embed.weight_half" not in attributes(graph)


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_rtn_rounds_every_weight_and_input_once(whole: Whole, family: str) -> None:
    graph = whole(family)
    floats = attributes(graph)
    linear, head = QuantSpec(w_bits=4, a_bits=4, w_group=16), QuantSpec(w_bits=8, a_bits=8)
    changed = run(graph, METHODS["rtn"].passes(QuantPlan(linear=linear, head=head)), check_quantized)
    assert changed == {"QuantizeWeights": 9, "InsertFakeQuant": 9, "StoreHalf": 1}
    assert count(graph, ops.fake_quant.default) == 9  # q, k and v share one linear by now, gate and up another
    weights = attributes(graph)
    for site in SITES:
        spec = head if site == "head" else linear
        grid = round_to_nearest(floats[f"{site}.weight"], bits=spec.w_bits, group=spec.w_group)
        assert torch.equal(weights[f"{site}.codes"], grid.codes)
        assert torch.equal(weights[f"{site}.w_scale"], grid.scale)
        assert f"{site}.weight" not in weights
    kept = {name for name in weights if name.endswith(("norm.weight", ".bias")) or name == "rope_frequencies"}
    assert kept == {name for name in floats if name.endswith(("norm.weight", ".bias")) or name == "rope_frequencies"}
    assert set(weights) - kept == {f"{site}.{leaf}" for site in SITES for leaf in ("codes", "w_scale")} | {
        "embed.weight_half"
    }


def test_skipped_sites_are_stored_in_half(whole: Whole) -> None:
    graph = whole("llada")
    plan = QuantPlan(linear=QuantSpec(w_bits=8, a_bits=8), head=None, skip=("blocks.0.*", "*.o_proj"))
    changed = run(graph, METHODS["rtn"].passes(plan), check_quantized)
    assert changed == {"QuantizeWeights": 3, "InsertFakeQuant": 3, "StoreHalf": 7}
    assert {site_of(linear) for linear in calls(graph, aten.linear.default)} == set(SITES)
    halves = {name.removesuffix(".weight_half") for name in attributes(graph) if name.endswith(".weight_half")}
    assert halves == {site for site in SITES if "blocks.0" in site or "o_proj" in site} | {"head", "embed"}
