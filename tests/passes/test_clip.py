"""The search of clip ratios against a slow loop over all of them."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from passes.solvers import grid as grids
from passes.solvers.clip import clip_ratios
from passes.solvers.nearest import round_to_nearest
from tests.passes.grids import textbook_nearest, values


def powered_error(weight: torch.Tensor, *, clip: torch.Tensor | None, power: float, **form: int) -> torch.Tensor:
    """Sum of |error|^power of each group, float64 [N, G]."""
    wrong = (values(round_to_nearest(weight, clip=clip, **form)) - weight.double()).abs()
    return wrong.reshape(len(weight), -1, form["group"] or weight.shape[1]).pow(power).sum(-1)


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**16),
    bits=st.sampled_from([3, 4]),
    group=st.sampled_from([0, 4]),
    symmetric=st.booleans(),
    power=st.sampled_from([2.0, 2.4]),
)
def test_no_ratio_is_better(seed: int, bits: int, group: int, symmetric: bool, power: float) -> None:
    weight = torch.randn(2, 8, generator=torch.Generator().manual_seed(seed)) ** 3
    form = {"bits": bits, "group": group, "symmetric": symmetric}
    found = clip_ratios(weight, **form, steps=20, power=power)
    assert (found.dtype, found.shape) == (torch.float32, (2, 8 // (group or 8)))
    candidates = [1 - step / 20 for step in range(16)]
    every = []
    for ratio in candidates:
        codes, scale, zero = textbook_nearest(weight.numpy(), **form, clip=np.full(found.shape, ratio, np.float32))
        parts = codes.reshape(*scale.shape, -1).astype(np.float64) - zero[..., None]
        wrong = parts * scale[..., None] - weight.double().numpy().reshape(parts.shape)
        every.append((np.abs(wrong) ** power).sum(-1))
    chosen = np.array(candidates)[np.argmin(every, axis=0)]
    # Two ratios whose errors differ by less than float32 sums do are equally good.
    least = torch.from_numpy(np.min(every, axis=0))
    reached = powered_error(weight, clip=found, power=power, **form)
    assert bool((reached <= least * (1 + 1e-5) + 1e-12).all()), chosen
    assert bool(torch.isin(found, torch.tensor(candidates)).all())


def test_an_outlier_is_clipped_and_an_even_row_is_not() -> None:
    even = torch.linspace(-7, 7, 15).repeat(1, 20)
    # 300 codes a step of 1 apart are worth more than one outlier at 8.5.
    outlier = torch.cat((even, torch.full((1, 1), 8.5)), dim=1)
    form = {"bits": 4, "group": 0, "symmetric": True}
    assert clip_ratios(even, **form).tolist() == [[1.0]]
    ratio = clip_ratios(outlier, **form)
    assert ratio.tolist() == [[pytest.approx(7 / 8.5, abs=0.01)]]
    assert powered_error(outlier, clip=ratio, power=2.4, **form) < powered_error(outlier, clip=None, power=2.4, **form)


def test_of_equal_errors_the_largest_ratio_wins() -> None:
    assert clip_ratios(torch.zeros(2, 4), bits=4, group=2, symmetric=False).tolist() == [[1.0, 1.0]] * 2


def test_ratios_stay_above_the_lowest() -> None:
    weight = torch.cat((torch.full((1, 4000), 0.5), torch.full((1, 1), 4.0)), dim=1)
    tried = {"bits": 3, "group": 0, "symmetric": True, "steps": 10}
    assert clip_ratios(weight, **tried, lowest=0.5).tolist() == [[pytest.approx(0.6)]]
    assert float(clip_ratios(weight, **tried, lowest=0.2)) < 0.5


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_ends_of_a_weight_are_looked_for_once(*, symmetric: bool) -> None:
    class Reductions(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            self.seen += func in (torch.ops.aten.amax.default, torch.ops.aten.amin.default)
            return func(*args, **(kwargs or {}))

    with Reductions() as count:
        clip_ratios(torch.randn(3, 8), bits=4, group=4, symmetric=symmetric)
    assert count.seen == (1 if symmetric else 2)


def test_rows_in_chunks_are_rows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(9, 8)
    expected = clip_ratios(weight, bits=3, group=4, symmetric=False)
    monkeypatch.setattr(grids, "CHUNK", 16)
    assert torch.equal(clip_ratios(weight, bits=3, group=4, symmetric=False), expected)
