"""Run-time costs: what the torch references of the ops multiply, what papers count, and the bars at 8B shapes."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.fx import GraphModule
from torch.utils.flop_counter import FlopCounterMode

from bench.costs import DREAM, LLADA, SHAPES
from passes.graph import add_attribute, calls, node_of, site_of
from pipeline import stages
from pipeline.costs import COUNTED, Cost, Costs, run_time_costs
from pipeline.lower import simulated_graph
from pipeline.models.config import ModelConfig
from pipeline.recipe_file import load_recipe
from plugins.prepare import PREPARE, prepare
from plugins.rotate import rotate

aten, ops = torch.ops.aten, torch.ops.dllmc

G = 16  # channels of a TAC block
MOST_MULTIPLY_ADDS, MOST_PARAMETERS = 0.03, 0.01
# Of one block: q, k, v, o, gate, up and down.
LINEARS = {LLADA: 4 * 4096**2 + 3 * 4096 * 12288, DREAM: 2 * 3584**2 + 2 * 3584 * 512 + 3 * 3584 * 18944}


@cache
def counted(name: str, recipe: str, *sets: str, tac: bool = False) -> Costs:
    graph = simulated_graph(SHAPES[name], load_recipe(recipe, list(sets)), {})
    if tac:
        insert_tac(graph, SHAPES[name])
    return run_time_costs(graph, SHAPES[name])


def insert_tac(graph: GraphModule, config: ModelConfig) -> None:
    """TAC before the transform of every output projection."""
    width = config.num_heads * config.head_dim
    for linear in calls(graph, aten.linear.default):
        site = site_of(linear)
        if not site.endswith(".o_proj"):
            continue
        node = node_of(node_of(linear.args[0]).args[0])  # behind the grid
        values = PREPARE.arguments(*node.args)
        with graph.graph.inserting_before(node):
            blocks = torch.empty(width // G, G, G, device="meta")
            values["tac_matrix"] = add_attribute(graph, f"{site}.tac_matrix", blocks)
            values["tac_bias"] = add_attribute(graph, f"{site}.tac_bias", torch.empty(width, device="meta"))
        node.args = tuple(values.values())


SIZE = st.integers(2, 6)  # of one channel einsum makes a product that the counter does not see


@given(rows=SIZE, left=SIZE, right=SIZE, transformed=st.booleans(), compensated=st.booleans(), scaled=st.booleans())
def test_multiply_adds_are_those_of_the_torch_reference(
    rows: int, left: int, right: int, transformed: bool, compensated: bool, scaled: bool
) -> None:
    width = left * right
    factors = (torch.ones(left, left), torch.ones(right, right)) if transformed else (None, None)
    tac = (torch.ones(right, left, left), torch.ones(width)) if compensated else (None, None)
    scale = torch.ones(width) if scaled else None
    call = (torch.ones(rows, width), None, scale, *tac, *factors)
    with FlopCounterMode(display=False) as counter:
        prepare(*call)
    found = COUNTED[ops.prepare.default](*call)
    products = sum(cost.multiply_adds for kind, cost in found.items() if kind != "scale")
    assert 2 * rows * products == counter.get_total_flops()
    assert found.get("scale", Cost()) == Cost(multiply_adds=width * scaled, parameters=width * scaled)
    stored = sum(value.numel() for value in call[1:] if value is not None)
    assert sum(cost.parameters for cost in found.values()) == stored


@given(rows=SIZE, blocks=SIZE, channels=SIZE)
def test_a_rotation_costs_what_its_reference_multiplies(rows: int, blocks: int, channels: int) -> None:
    call = (
        torch.ones(rows, blocks * channels),
        torch.ones(blocks, channels, channels),
        torch.arange(blocks * channels),
    )
    with FlopCounterMode(display=False) as counter:
        rotate(*call)
    (cost,) = COUNTED[ops.rotate.default](*call).values()
    assert 2 * rows * cost.multiply_adds == counter.get_total_flops()
    assert cost.parameters == call[1].numel() + call[2].numel()


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("recipe", ["rtn-w4a4", "flatquant-w4a4"])
def test_linears_of_the_blocks_are_counted_and_no_others(name: str, recipe: str) -> None:
    found = counted(name, recipe)
    assert found.linears == Cost(multiply_adds=LINEARS[name], parameters=LINEARS[name])
    assert found.added.keys() == (set() if recipe == "rtn-w4a4" else {"transform"})


def test_kronecker_factors_cost_what_the_closest_pairs_do() -> None:
    """64 x 64 three times and 96 x 128; of o_proj heads times the channels of one."""
    found = counted(LLADA, "flatquant-w4a4").added["transform"]
    across_heads = 4096 * (32 + 128)
    assert found.multiply_adds == 2 * 4096 * 128 + across_heads + 12288 * 224
    assert found.parameters == 4 * 64**2 + 32**2 + 128**2 + 96**2 + 128**2


def test_heads_are_rotated_each_by_itself() -> None:
    """Queries and keys: 28 and 4 heads of 128 channels, one rotation for both."""
    found = counted(DREAM, "quarot-w4a4", "attention.k_bits=4")
    assert found.added["rotation"].multiply_adds == (28 + 4) * 128**2
    assert found.added["rotation"].parameters == 2 * (128**2 + 128)


@pytest.mark.parametrize("name", SHAPES)
def test_tac_costs_g_a_channel(name: str) -> None:
    plain, found = (counted(name, "freeact-w4a4", tac=tac) for tac in (False, True))
    width = SHAPES[name].num_heads * 128
    assert found.added["TAC"] == Cost(multiply_adds=width * G, parameters=width * (G + 1))
    assert found.added["transform"] == plain.added["transform"]
    assert found.linears == plain.linears


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("recipe", ["freeact-w4a4", "flatquant-w4a4"])
def test_transforms_and_tac_stay_below_the_bars(name: str, recipe: str) -> None:
    found = counted(name, recipe, tac=True)
    assert 0.02 < found.multiply_adds <= MOST_MULTIPLY_ADDS
    assert 0 < found.parameters <= MOST_PARAMETERS


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("recipe", ["star-w4a4", "star-w8a8", "star-plus-w4a4"])
def test_star_stays_below_the_bars(name: str, recipe: str) -> None:
    found = counted(name, recipe)
    assert found.added.keys() == {"transform", "TAC"}
    assert found.multiply_adds <= MOST_MULTIPLY_ADDS
    assert found.parameters <= MOST_PARAMETERS


def test_shares_do_not_depend_on_the_number_of_blocks() -> None:
    config = replace(SHAPES[LLADA], num_layers=2)
    found = run_time_costs(simulated_graph(config, load_recipe("flatquant-w4a4"), {}), config)
    one = counted(LLADA, "flatquant-w4a4")
    assert found.linears.multiply_adds == 2 * one.linears.multiply_adds
    assert (found.multiply_adds, found.parameters) == (one.multiply_adds, one.parameters)


@pytest.mark.parametrize(
    ("recipe", "shares"), [("quarot-w4a4", "1.6 % multiply-adds, 0.02 % parameters"), ("rtn-w4a4", "")]
)
def test_the_stage_that_lowers_says_what_transforms_cost(
    recipe: str, shares: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(stages, "write_onnx", lambda *_, **__: {})
    monkeypatch.setattr(stages, "Weights", lambda _: SimpleNamespace(names=(), numbers={}))
    stage = SimpleNamespace(counter=lambda *_: print, finish=lambda text, **_: said.append(text))
    checkpoint, work = SimpleNamespace(config=SHAPES[LLADA]), SimpleNamespace(path=tmp_path)
    job: Any = SimpleNamespace(checkpoint=checkpoint, recipe=load_recipe(recipe), work=work)
    stages.lower(job, stage)
    costs = f"; run-time cost of transforms: {shares}" if shares else ""
    assert said == [f"ONNX opset 24: standard ops only{costs}"]
