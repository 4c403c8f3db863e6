"""Gates of mask states: which slices, what they zero, and where a graph knows its states from."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from passes.fit import CalibrationError
from passes.gate_transforms import Gate, GateTransforms, gate_masks, gate_of, gated_factors, state_node
from passes.graph import calls, node_of
from passes.insert_transform import InsertTransform, Transform
from passes.solvers.draws import generator
from passes.solvers.kronecker import factor_pairs
from plugins.prepare import prepare
from tests.passes.conftest import Whole
from tests.passes.sketch import Sketch, assert_untouched, edited, only, ops

MASK = 37


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed, str(shape)))


def value_of(graph: GraphModule, node: Node, inputs: tuple[Tensor, ...]) -> Tensor:
    """What this node computes."""

    class Recorder(Interpreter):
        def run_node(self, n: Node) -> Any:
            found[n] = super().run_node(n)
            return found[n]

    found: dict[Node, Any] = {}
    Recorder(graph).run(*inputs)
    value: Tensor = found[node]
    return value


def transformed(*, state: bool = True) -> GraphModule:
    """A transformed linear of 4 x 8 channels behind its inputs, and one that is not transformed."""
    sketch = Sketch()
    x = sketch.input("x")
    if state:
        sketch.input("state")
    graph = sketch.output(sketch.linear(sketch.linear(x, "a.o_proj", drawn(6, 32)), "a.down_proj", drawn(2, 6)))
    made = Transform(left=torch.eye(4), right=torch.eye(8))
    edited_graph, _ = edited(graph, InsertTransform(lambda site: made if site == "a.o_proj" else None))
    return edited_graph


@pytest.mark.parametrize(
    ("factors", "gate"),
    [((64, 64), Gate(0, 2)), ((56, 64), Gate(1, 2)), ((96, 128), Gate(0, 3)), ((128, 148), Gate(0, 4)),
     ((32, 128), Gate(0, 1)), ((28, 128), Gate(1, 4)), ((4, 32), Gate(1, 1)), ((1, 7), Gate(1, 1))],
)  # fmt: skip
def test_gates_of_the_models_hold_a_thirty_second(factors: tuple[int, int], gate: Gate) -> None:
    assert gate_of(factors, 32) == gate


@pytest.mark.parametrize(
    ("width", "factors"),
    [(128, (4, 32)), (384, (12, 32)), (3584, (56, 64)), (4096, (64, 64)), (12288, (96, 128)), (18944, (128, 148)),
     (100, (10, 10)), (97, (1, 97))],
)  # fmt: skip
def test_the_closest_factors_with_a_thirty_second(width: int, factors: tuple[int, int]) -> None:
    assert gated_factors(width, 32) == factors


@given(st.integers(1, 3000), st.integers(2, 40))
def test_factors_hold_the_share_where_any_do(width: int, share: int) -> None:
    def size(factors: tuple[int, int]) -> int | None:
        try:
            gate = gate_of(factors, share)
        except CalibrationError:
            return None
        return gate.size * factors[1 - gate.axis]

    pairs = factor_pairs(width)
    exact = [pair for pair in pairs if (found := size(pair)) is not None and found * share == width]
    assert gated_factors(width, share) == (exact or pairs)[0]


@given(st.integers(1, 40), st.integers(1, 40), st.integers(2, 40))
def test_no_smaller_gate_would_do(a: int, b: int, share: int) -> None:
    def fits(axis: int, size: int) -> bool:
        return size * (a, b)[1 - axis] * share >= a * b and 2 * size < (a, b)[axis]

    possible = [(size * (a, b)[1 - axis], axis, size) for axis in (0, 1) for size in range(41) if fits(axis, size)]
    if not possible:
        with pytest.raises(
            CalibrationError, match=f"a tile of {a} x {b} channels has no room for two gates of 1/{share}"
        ):
            gate_of((a, b), share)
        return
    found = gate_of((a, b), share)
    assert (found.axis, found.size) == min(possible)[1:]


@pytest.mark.parametrize("gate", [Gate(0, 1), Gate(1, 2)])
def test_masks_are_what_the_op_keeps(gate: Gate) -> None:
    x, state = drawn(2, 5, 24), torch.tensor([[0, 1, 0, 0, 1], [1, 1, 1, 0, 0]])
    eyes = torch.eye(4), torch.eye(6)
    found = prepare(x, left=eyes[0], right=eyes[1], state=state.int(), gate_axis=gate.axis, gate_size=gate.size)
    assert torch.equal(found, (x.unflatten(-1, (4, 6)) * gate_masks((4, 6), gate)[state]).flatten(-2))
    assert int((gate_masks((4, 6), gate)[1] == 0).sum()) == gate.size * (6, 4)[gate.axis]


def test_a_block_reads_its_state_and_loses_each_others_slice() -> None:
    graph = transformed()
    gated, counts = edited(graph, GateTransforms(16, MASK))
    assert counts == [1]
    node = only(gated, ops.prepare.default)
    assert (node_of(node.args[7]).target, *node.args[9:]) == ("state", 1, 1)
    x, state = drawn(1, 2, 32), torch.tensor([[0, 1]], dtype=torch.int32)
    kept = x.unflatten(-1, (4, 8)).clone()
    kept[0, 0, :, 6] = 0  # masked, then unmasked, stand last
    kept[0, 1, :, 7] = 0
    assert torch.equal(gated(x, state), graph(kept.flatten(-2), state))


def test_whatever_else_is_done_to_the_input_stays() -> None:
    sketch = Sketch()
    x, state = sketch.input("x"), sketch.input("state")
    gain, left, right = (
        sketch.weight(name, value)
        for name, value in (("gain", drawn(32)), ("left", torch.eye(4)), ("right", torch.eye(8)))
    )
    prepare = sketch(ops.prepare.default, x, gain, None, None, None, left, right, None, 1e-3)
    gated, _ = edited(sketch.output(prepare, state), GateTransforms(16, MASK))
    x, gain, *missing, left, right, state, eps, axis, size = only(gated, ops.prepare.default).args
    assert [node_of(value).target for value in (x, gain, left, right, state)] == ["x", "gain", "left", "right", "state"]
    assert (*missing, eps, axis, size) == (None, None, None, 1e-3, 1, 1)


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_a_whole_graph_tells_masks_by_their_id(family: str, whole: Whole, feeds: tuple[Tensor, ...]) -> None:
    graph = whole(family)
    made = Transform(left=torch.eye(4), right=torch.eye(8))
    chosen = ("blocks.0.attn.q_k_v_proj", "blocks.1.mlp.gate_up_proj")
    gated, counts = edited(
        graph, InsertTransform(lambda site: made if site in chosen else None), GateTransforms(32, MASK)
    )
    assert counts == [2, 2]
    assert len({node_of(node.args[7]) for node in calls(gated, ops.prepare.default)}) == 1
    expected, found = graph(*feeds), gated(*feeds)
    assert not any(torch.equal(one, other) for one, other in zip(found[1:4], expected[1:4], strict=True))
    masked = feeds[0].clone()
    masked[0, 0] = MASK
    assert not torch.equal(gated(masked, *feeds[1:])[1], found[1])


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_a_written_token_changes_its_own_row_alone(family: str, whole: Whole, feeds: tuple[Tensor, ...]) -> None:
    """Before the first attention rows do not know of each other, and neither do their states."""
    made = Transform(left=torch.eye(4), right=torch.eye(8))
    site = "blocks.0.attn.q_k_v_proj"
    gated, _ = edited(
        whole(family), InsertTransform(lambda name: made if name == site else None), GateTransforms(32, MASK)
    )
    node = only(gated, ops.prepare.default)
    masked = feeds[0].clone()
    masked[0, 2:6] = MASK
    written = masked.clone()
    written[0, 4] = 3
    before, after = (value_of(gated, node, (ids, *feeds[1:])) for ids in (masked, written))
    assert (before != after).any(-1).nonzero().tolist() == [[0, 4]]
    slices = [value.unflatten(-1, (4, 8))[0, 4, :, 6:] != 0 for value in (before, after)]
    assert [each.any(0).tolist() for each in slices] == [[True, False], [False, True]]


def test_without_a_transform_nothing_is_gated() -> None:
    sketch = Sketch()
    x = sketch(ops.prepare.default, sketch.input("x"), sketch.weight("norm.weight", torch.ones(6)))
    assert_untouched(sketch.output(sketch.linear(x, "a.o_proj", drawn(2, 6))), GateTransforms(32, MASK))


def test_a_graph_that_knows_no_masks_is_refused() -> None:
    with pytest.raises(ValueError, match="no mask state can be told from inputs x"):
        GateTransforms(32, MASK)(transformed(state=False))


def test_state_of_ids() -> None:
    sketch = Sketch()
    graph = sketch.output(sketch.input("input_ids"))
    state = state_node(graph, MASK)
    only_output = next(iter(graph.graph.find_nodes(op="output")))
    only_output.args = (state,)
    graph.recompile()
    found = graph(torch.tensor([[1, MASK], [MASK, 0]]))
    assert found.dtype == torch.int32
    assert found.tolist() == [[0, 1], [1, 0]]
