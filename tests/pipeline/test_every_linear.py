"""Every method at every format quantises every linear, and its lowered graph computes what was simulated.

Weights come from the real stage, block by block; the whole graphs are made on shapes, as they are for an export.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch.fx import GraphModule

from passes.base import Pass, run
from passes.fit import Fit
from passes.graph import attributes, calls, is_call, node_of, set_attributes, site_of
from passes.invariants import check_lowered
from passes.lowering import LOWERING
from passes.methods import METHODS
from passes.quant_spec import QuantPlan
from passes.quantize_weights import QuantizeWeights, nearest
from pipeline.accounting import take_account
from pipeline.calibration.canvas import Canvas
from pipeline.calibration.states import States
from pipeline.capture import ENDS, capture_piece, constants, materialise, pieces
from pipeline.lower import simulated_graph
from pipeline.models.checkpoint import Checkpoint
from pipeline.quantize import Weights, simulate, state_of, write_weights
from pipeline.recipe import Recipe, linear_names
from tests.passes.lockstep import Values, assert_lowered_equals_simulated
from tests.passes.sketch import copy_of
from tests.pipeline.fitted import feeds_of, quick_recipe, random_checkpoint, random_states

aten, ops = torch.ops.aten, torch.ops.dllmc
Bits = tuple[int, int]


@dataclass(frozen=True)
class Case:
    """One model as one recipe quantises it: sidecar files, and the whole graphs on shapes."""

    checkpoint: Checkpoint
    recipe: Recipe
    states: States
    weights: Weights
    simulated: GraphModule
    lowered: GraphModule


Quantised = Callable[[str, Bits, str], Case]

FINE = ("linear.w_group=16", "linear.a_group=16", "linear.symmetric=false")


def cases() -> list[tuple[str, Bits, str]]:
    """Every method and format, on one family or the other; with integer activations also on fine grids with zeros."""
    chosen = []
    for name, method in METHODS.items():
        formats = sorted(method.formats - {(16, 16)})
        chosen += [(name, bits, ("grouped", "llada")[index % 2]) for index, bits in enumerate(formats)]
        chosen += [(name, bits, "grouped fine") for bits in formats if bits == (4, 4)]
    return chosen


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> Quantised:
    """A case, made once."""
    root = tmp_path_factory.mktemp("quantised")

    @cache
    def made(method: str, bits: Bits, family: str) -> Case:
        model, *fine = family.split()
        checkpoint = random_checkpoint(model, root / "models")
        recipe, states = quick_recipe(method, bits, *(FINE if fine else ())), random_states(checkpoint)
        folder = root / f"{method}-w{bits[0]}a{bits[1]}-{family}"
        write_weights(checkpoint, recipe, folder, states=states, on_piece=lambda _: None)
        weights = Weights(folder)
        simulated = simulated_graph(checkpoint.config, recipe, weights.numbers)
        lowered = copy_of(simulated)
        run(lowered, LOWERING, check_lowered)
        return Case(checkpoint, recipe, states, weights, simulated, lowered)

    return made


@pytest.mark.parametrize(("method", "bits", "family"), cases(), ids=str)
def test_every_linear_is_quantised(quantised: Quantised, method: str, bits: Bits, family: str) -> None:
    case, config = quantised(method, bits, family), quantised(method, bits, family).checkpoint.config
    linears = list(calls(case.simulated, aten.linear.default))
    assert [site_of(linear) for linear in linears] == [*linear_names(config), "head"]
    assert len(linears) == 4 * config.num_layers + 1
    for linear in linears:
        w_bits, a_bits = (8, 8) if site_of(linear) == "head" else bits
        assert is_call(linear.args[1], ops.dequantize.default)
        assert node_of(linear.args[1]).args[2] == w_bits
        assert is_call(linear.args[0], ops.fake_quant.default) == (a_bits < 16)
        assert a_bits == 16 or node_of(linear.args[0]).args[1] == a_bits
    account = take_account(case.checkpoint, case.recipe, case.weights)
    assert (account.linears_quantised, account.linears_kept) == (4 * config.num_layers, 0)
    assert account.tensors_used == account.tensors_total


@pytest.mark.parametrize(("method", "bits", "family"), cases(), ids=str)
@torch.no_grad()
def test_what_is_lowered_is_what_was_simulated(quantised: Quantised, method: str, bits: Bits, family: str) -> None:
    case = quantised(method, bits, family)
    stored = case.weights.all()
    kinds = {name: (value.shape, value.dtype) for name, value in stored.items()}
    assert kinds == {name: (value.shape, value.dtype) for name, value in attributes(case.lowered).items()}
    assert not list(calls(case.lowered, ops.prepare.default)), "what a quantiser can do first stands outside it"
    simulated, lowered = (materialise(copy_of(graph), stored) for graph in (case.simulated, case.lowered))
    compared = assert_lowered_equals_simulated(simulated, lowered, feeds_of(case.checkpoint, case.states))
    assert compared == (1 if bits[1] == 16 else 4 * case.checkpoint.config.num_layers + 1)


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if (4, 4) in method.formats])
@torch.no_grad()
def test_blocks_in_a_row_are_the_whole_graph(quantised: Quantised, method: str) -> None:
    """Calibration sees blocks and a session the whole: clip ratios, mask states and rotations must be the same."""
    case = quantised(method, (4, 4), "grouped fine")
    config, weights = case.checkpoint.config, case.weights
    graphs = {}
    for piece in pieces(config):
        shapes = {name: case.checkpoint.tensor(name).to("meta", torch.float32) for name in piece.weights}
        graphs[piece.name] = capture_piece(config, piece, shapes)
        simulate(graphs[piece.name], case.recipe, config, weights.numbers)
        set_attributes(graphs[piece.name], state_of(graphs[piece.name], weights))
    canvas = Canvas(case.states, constants(config)["rope_frequencies"])
    x = graphs[ENDS](case.states.input_ids, torch.zeros(len(canvas.valid), 0, config.hidden_size))[0]
    for index in range(config.num_layers):
        x = graphs[f"blocks.{index}"](*canvas.inputs_of(x))
    _, expected = graphs[ENDS](case.states.input_ids[:, :0], x)
    whole = Values(materialise(copy_of(case.simulated), weights.all()))
    whole.run(*feeds_of(case.checkpoint, case.states))
    found = whole.values[list(calls(whole.graph_module, aten.linear.default))[-1]]
    assert torch.equal(found, expected)


class _Leave:
    """Quantises all linears but one, as a wrong list of names would."""

    def __init__(self, plan: QuantPlan, left: str) -> None:
        self.edit = QuantizeWeights(replace(plan, skip=(*plan.skip, left)), nearest)

    def __call__(self, graph: GraphModule) -> int:
        return self.edit(graph)


@pytest.mark.parametrize("left", ["blocks.*.attn.q_k_v_proj", "blocks.1.mlp.down_proj"])
@pytest.mark.parametrize("bits", [(4, 4), (4, 16)], ids=str)
def test_a_method_that_skips_a_linear_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bits: Bits, left: str
) -> None:
    """The study's own GPTQ left q, k and v of LLaDA in 16 bits, and nothing said so."""

    def solve(plan: QuantPlan, fit: Fit) -> list[Pass]:
        return [_Leave(plan, left)]

    monkeypatch.setitem(METHODS, "rtn", replace(METHODS["rtn"], solve=solve))
    checkpoint = random_checkpoint("llada", tmp_path)
    with pytest.raises(RuntimeError, match=f"method rtn left in float .*{left.replace('*', '0')}"):
        write_weights(checkpoint, quick_recipe("rtn", bits), tmp_path / "weights", on_piece=lambda _: None)
