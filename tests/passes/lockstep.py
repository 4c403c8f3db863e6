"""A lowered graph against the simulated one it came from, op by op, so that no rounding is compared twice.

The lowered graph runs with every quantiser and every integer linear replaced, once it has been compared, by what the
simulated graph has in its place. What is left between them is one quantiser or one linear, whose error is bounded.
Shape letters: K inner, N outputs, G groups.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from passes.graph import calls, node_of
from plugins.quantize import quantize
from tests.passes.sketch import aten, ops

ULP = 2.0**-24  # relative error of one float32 rounding
LINEARS = (ops.int4_linear.default, ops.int8_linear.default)
FAKE_QUANT_NUMBERS = ("bits", "symmetric", "a_group", "clip_lo", "clip_hi")
Codes = tuple[Tensor, ...]


def assert_same_codes(found: Codes, expected: Codes, y: Tensor, *, limit: int, group: int) -> None:
    """Codes of one normed row y [..., K], the norm computed in two ways: equal but where a step lies next to a half.

    The norms differ by the roundings of K squares, a root, a quotient and a product; the scale by one more. A step
    x / s is at most 2 `limit`.
    """
    relative = (y.shape[-1] + 12) * ULP
    assert bool(((found[1] - expected[1]).abs() <= relative * expected[1]).all())
    scale = expected[1].repeat_interleave(group or y.shape[-1], dim=-1).double()

    def near_half(steps: Tensor) -> Tensor:
        return ((steps - steps.floor()) - 0.5).abs() <= 2 * limit * 2 * relative

    same = found[0] == expected[0]
    if len(found) > 2 and found[2].numel():
        grouped = torch.unflatten(y.double(), -1, (-1, group or y.shape[-1]))
        middle = grouped.amax(-1).clamp(min=0) + grouped.amin(-1).clamp(max=0)
        same_zero = found[2] == expected[2]
        assert bool((same_zero | near_half(middle / (2 * expected[1].double()))).all())
        same |= ~same_zero.repeat_interleave(group or y.shape[-1], dim=-1)
    assert bool((same | near_half(y.double() / scale)).all())
    assert int((found[0].int() - expected[0].int()).abs().max()) <= 1


@dataclass
class Simulated:
    """What one linear of the simulated graph computes, epilogue included, and how far sums in other orders may lie."""

    value: Tensor
    bound: Tensor


class Values(Interpreter):
    """Runs a graph and keeps the value of every node."""

    def __init__(self, graph: GraphModule) -> None:
        super().__init__(graph)
        self.graph_module = graph
        self.values: dict[Node, Any] = {}

    def run_node(self, n: Node) -> Any:
        self.values[n] = super().run_node(n)
        return self.values[n]

    def linears(self) -> Iterator[Simulated]:
        """Every linear on simulated codes, in order."""
        for linear in calls(self.graph_module, aten.linear.default):
            if node_of(linear.args[0]).target is ops.fake_quant.default:
                yield self._with_epilogue(linear)

    def _with_epilogue(self, linear: Node) -> Simulated:
        y, bound = self.values[linear], self._bound(linear)
        users = list(linear.users)
        if users[0].target is aten.slice.Tensor and len(users) == 2:
            (silu,) = users[0].users
            (product,) = silu.users
            gate, up = y[..., 0::2].double(), y[..., 1::2].double()
            active = torch.nn.functional.silu(gate)
            # |silu'| <= 1.1; silu itself is good to 8 roundings in both
            moved = 1.1 * bound[..., 0::2] * (up.abs() + bound[..., 1::2]) + active.abs() * bound[..., 1::2]
            return Simulated(self.values[product], moved + 10 * ULP * (active * up).abs())
        if len(users) == 1 and users[0].target is aten.add.Tensor:
            total = self.values[users[0]]
            return Simulated(total, bound + 2 * ULP * total.abs())
        return Simulated(y, bound)

    def _bound(self, linear: Node) -> Tensor:
        """K + G roundings of sums, and a few of scales, of the sum of magnitudes; in float64."""
        x, weight, *bias = (self.values[node_of(argument)].double().abs() for argument in linear.args)
        total = x @ weight.transpose(0, 1)
        total = total + bias[0] if bias else total
        bound: Tensor = (2 * x.shape[-1] + 8) * ULP * total
        return bound


class Forced(Interpreter):
    """Runs the lowered graph, comparing and then replacing as said above."""

    def __init__(self, lowered: GraphModule, simulated: Values) -> None:
        super().__init__(lowered)
        self.simulated = simulated
        self.sources = calls(simulated.graph_module, ops.fake_quant.default)
        self.expected = simulated.linears()
        self.compared = 0

    def run_node(self, n: Node) -> Any:
        found = super().run_node(n)
        if n.target is ops.quantize.default:
            return self._codes(found)
        if n.target in LINEARS:
            expected = next(self.expected)
            assert bool(((found - expected.value).abs() <= expected.bound).all()), n.name
            self.compared += 1
            return expected.value
        return found

    def _codes(self, found: Codes) -> Codes:
        source = next(self.sources)
        x = self.simulated.values[node_of(source.args[0])]
        numbers: dict[str, Any] = dict(zip(FAKE_QUANT_NUMBERS, source.args[1:], strict=True))
        expected = quantize(x, **numbers)
        assert_same_codes(found, expected, x, limit=2 ** (numbers["bits"] - 1) - 1, group=numbers["a_group"])
        return expected


def assert_records_agree(found: Codes, expected: Codes, bound: float, inv_temp: Tensor) -> None:
    """Records of two rows of logits no further apart than `bound`; each quantity is Lipschitz in the largest change."""
    top_ids, top_logits, tail, neg_entropy, lse_t = found
    slack = bound + 4 * ULP * float(expected[1].abs().max())
    assert bool(((top_logits - expected[1]).abs() <= slack).all())
    clear = expected[1][..., 0] - expected[1][..., 1] > 2 * slack
    assert bool((top_ids[..., 0] == expected[0][..., 0])[clear].all())
    assert bool(((tail - expected[2]).abs() <= expected[2] * (4 * slack + 4 * ULP)).all())
    assert bool(((neg_entropy - expected[3]).abs() <= 16 * slack).all())  # 2 ln V, V <= 2900
    assert bool(((lse_t - expected[4]).abs() <= slack * inv_temp[:, None] + 4 * ULP * expected[4].abs()).all())


@torch.no_grad()
def assert_lowered_equals_simulated(simulated: GraphModule, lowered: GraphModule, inputs: tuple[Tensor, ...]) -> int:
    """Compare every quantiser, linear and output of the two; returns how many integer linears were compared."""
    values = Values(simulated)
    expected = values.run(*inputs)
    forced = Forced(lowered, values)
    found = forced.run(*inputs)
    assert next(forced.sources, None) is None, "a simulated quantiser has no real one"
    rest = list(forced.expected)
    if not rest:  # the head stayed in float, or its logits are an output: nothing is left to round differently
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)
        return forced.compared
    (head,) = rest
    assert_records_agree(found, expected, float(head.bound.max()), inputs[-1])
    return forced.compared + 1
