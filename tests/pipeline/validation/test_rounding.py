"""Errors put on a graph: as large as those of float32, larger with depth, and none where integers are."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule, symbolic_trace

from pipeline.validation.rounding import UNIT, Rounded
from tests.pipeline.validation.conftest import Lowered

aten = torch.ops.aten


def spread(graph: GraphModule, *inputs: Tensor, scale: float = 1.0) -> Tensor:
    """Differences of a run with errors, in units of the rms."""
    exact = graph(*inputs)
    moved = Rounded(graph, draw=torch.Generator().manual_seed(7), scale=scale).run(*inputs)
    difference: Tensor = (moved - exact) / exact.square().mean().sqrt()
    return difference


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


@pytest.mark.parametrize("inner", [16, 256, 1024])
def test_a_linear_is_off_by_more_than_float32_and_by_little_more(inner: int) -> None:
    x, weight = torch.randn(64, inner), torch.randn(96, inner)

    def linear(x: Tensor, weight: Tensor) -> Any:
        return aten.linear.default(x, weight)

    graph = symbolic_trace(linear)
    found = rms(spread(graph, x, weight))
    assert found == pytest.approx(math.sqrt(inner) * UNIT, rel=0.1)
    exact = x.double() @ weight.double().T
    true = rms(torch.nn.functional.linear(x, weight).double() - exact) / rms(exact)
    assert true <= found <= 100 * true


def test_a_sum_that_cancels_is_off_by_its_terms() -> None:
    x = torch.tensor([[1000.0, -1000.0, 1.0]])

    def linear(x: Tensor, weight: Tensor) -> Any:
        return aten.linear.default(x, weight)

    found = rms(spread(symbolic_trace(linear), x, torch.ones(4096, 3)))
    assert found == pytest.approx(1414 * math.sqrt(3) * UNIT, rel=0.1)


def test_depth_enters() -> None:
    def deep(layers: int) -> GraphModule:
        def layered(x: Tensor, weight: Tensor) -> Tensor:
            for _ in range(layers):
                x = aten.linear.default(aten.rms_norm.default(x, [64]), weight)
            return x

        return symbolic_trace(layered)

    x, weight = torch.randn(32, 64), torch.linalg.qr(torch.randn(64, 64)).Q
    one, sixteen = (rms(spread(deep(layers), x, weight)) for layers in (1, 16))
    assert one == pytest.approx(math.sqrt(128) * UNIT, rel=0.2)
    assert sixteen == pytest.approx(4 * one, rel=0.2)


def test_codes_that_are_given_are_used(lowered: Lowered) -> None:
    inputs = [torch.from_numpy(array) for array in lowered.feeds[0].as_dict().values()]
    exact = Rounded(lowered.graph)
    expected = exact.run(*inputs)
    moved = Rounded(lowered.graph, draw=torch.Generator().manual_seed(1), scale=1e4, codes=exact.left)
    found = moved.run(*inputs)
    assert all(
        torch.equal(a, b)
        for ours, theirs in zip(moved.left, exact.left, strict=True)
        for a, b in zip(ours, theirs, strict=True)
    )
    assert torch.allclose(found[1], expected[1], rtol=1e-2)
    assert not torch.equal(moved.entered[1], exact.entered[1])
    free = Rounded(lowered.graph, draw=torch.Generator().manual_seed(1), scale=1e4)
    free.run(*inputs)
    assert any(not torch.equal(a[0], b[0]) for a, b in zip(free.left, exact.left, strict=True))
    plain = Rounded(lowered.graph)
    assert all(torch.equal(a, b) for a, b in zip(plain.run(*inputs), expected, strict=True))
