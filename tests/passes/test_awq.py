"""Searched scales and clips against plain loops over the definitions; never worse than rounding to nearest."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from passes.solvers import grid
from passes.solvers.awq import Requantize, same_gram, search_clip, search_scale
from passes.solvers.nearest import round_to_nearest
from plugins.dequantize import dequantize


def format_of(bits: int, group: int, symmetric: bool) -> Requantize:
    def requantize(weight: Tensor, clip: Tensor | None) -> Tensor:
        found = round_to_nearest(weight, bits=bits, group=group, symmetric=symmetric, clip=clip)
        return dequantize(found.codes, found.scale, bits, group, found.zero)

    return requantize


def plain_grid(values: list[float], bits: int, symmetric: bool, clip: float) -> list[float]:
    """One group on its grid, number by number."""
    if symmetric:
        top = 2 ** (bits - 1) - 1
        step = clip * max(abs(value) for value in values) / top or 1.0
        return [step * min(max(round(value / step), -top), top) for value in values]
    high, low = clip * max(*values, 0.0), clip * min(*values, 0.0)
    step = (high - low) / (2**bits - 1) or 1.0
    zero = round(-low / step)
    return [step * (min(max(round(value / step) + zero, 0), 2**bits - 1) - zero) for value in values]


def plain_weight(weight: Tensor, bits: int, group: int, symmetric: bool, clip: float = 1.0) -> Tensor:
    size = group or weight.shape[1]
    rows = []
    for row in weight.tolist():
        parts = [plain_grid(row[k : k + size], bits, symmetric, clip) for k in range(0, len(row), size)]
        rows.append([value for part in parts for value in part])
    return torch.tensor(rows, dtype=torch.float64)


def skewed(seed: int, outputs: int, inner: int, samples: int) -> tuple[Tensor, Tensor]:
    """A weight, and rows with a few loud channels."""
    draw = torch.Generator().manual_seed(seed)
    loud = torch.ones(inner)
    loud[torch.randperm(inner, generator=draw)[: inner // 4]] = 12.0
    return torch.randn(outputs, inner, generator=draw), torch.randn(samples, inner, generator=draw) * loud


FORMATS = st.sampled_from([(4, 0, True), (3, 4, False), (4, 4, False), (4, 8, True)])


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 999), FORMATS, st.sampled_from([5, 40]))
def test_scales_are_those_of_a_plain_search(seed: int, form: tuple[int, int, bool], samples: int) -> None:
    weight, rows = skewed(seed, 3, 16, samples)
    magnitude = rows.abs().mean(0)
    found = search_scale(weight, rows, magnitude, format_of(*form), steps=10)
    errors, scales = [], []
    for step in range(10):
        powers = [max(m ** (step / 10), 1e-4) for m in magnitude.double().tolist()]
        scale = torch.tensor([power / (max(powers) * min(powers)) ** 0.5 for power in powers], dtype=torch.float64)
        value = plain_weight((weight * scale.float()), *form) / scale
        error = 0.0
        for x in rows.double():
            for wanted, row in zip(weight.double(), value, strict=True):
                error += float((x * (row - wanted)).sum()) ** 2
        errors.append(error)
        scales.append(scale)
    # A weight next to a half may round the other way in float32; the error that it costs is all that can differ.
    assert found.error == pytest.approx(min(errors), rel=1e-3)
    assert found.plain_error == pytest.approx(errors[0], rel=1e-3)
    chosen = min(range(10), key=lambda step: float((found.scale - scales[step]).abs().max()))
    assert torch.allclose(found.scale, scales[chosen].float(), rtol=1e-5)
    assert errors[chosen] == pytest.approx(min(errors), rel=1e-3)


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 999), FORMATS, st.sampled_from([3, 40]))
def test_clips_are_those_of_a_plain_search(seed: int, form: tuple[int, int, bool], samples: int) -> None:
    bits, group, symmetric = form
    weight, rows = skewed(seed, 3, 16, samples)
    found = search_clip(weight, rows, format_of(*form), group=group, steps=10, lowest=0.5)
    size = group or 16
    assert found.shape == (3, 16 // size)
    ratios = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5]
    values = [plain_weight(weight, bits, group, symmetric, ratio) for ratio in ratios]
    for n in range(3):
        for g in range(16 // size):
            part = slice(g * size, (g + 1) * size)
            errors = [
                sum(float((x[part] * (value[n, part] - weight[n, part].double())).sum()) ** 2 for x in rows.double())
                for value in values
            ]
            chosen = min(range(6), key=lambda i: abs(ratios[i] - float(found[n, g])))
            assert float(found[n, g]) == pytest.approx(ratios[chosen])
            assert errors[chosen] == pytest.approx(min(errors), rel=1e-3)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 9999), st.sampled_from([(3, 4, False), (4, 0, True), (8, 0, True)]))
def test_never_worse_than_rounding_to_nearest(seed: int, form: tuple[int, int, bool]) -> None:
    weight, rows = skewed(seed, 8, 16, 24)
    requantize = format_of(*form)
    plain = float((rows @ (requantize(weight, None) - weight).T).double().square().sum())
    found = search_scale(weight, rows, rows.abs().mean(0), requantize)
    assert found.error <= found.plain_error
    assert found.plain_error == pytest.approx(plain, rel=1e-4)
    scaled = weight * found.scale
    clip = search_clip(scaled, rows / found.scale, requantize, group=form[1])
    assert 0.5 <= float(clip.min()) <= float(clip.max()) <= 1.0
    parts = form[1] or 16

    def by_group(ratios: Tensor | None) -> Tensor:
        change = (requantize(scaled, ratios) - scaled).unflatten(1, (-1, parts))
        x = (rows / found.scale).unflatten(1, (-1, parts))
        return torch.einsum("ngk,mgk->mng", change, x).square().sum(0)

    assert bool((by_group(clip) <= by_group(None) * (1 + 1e-4)).all())


def test_loud_channels_are_scaled_up() -> None:
    """What the method is for: 1 % of the channels decide the error (section 3.1)."""
    draw = torch.Generator().manual_seed(1)
    rows, weight = torch.randn(64, 128, generator=draw), torch.randn(32, 128, generator=draw)
    rows[:, 5] *= 50
    found = search_scale(weight, rows, rows.abs().mean(0), format_of(3, 0, True))
    assert int(found.scale.argmax()) == 5
    assert found.error < 0.5 * found.plain_error


@pytest.mark.parametrize("samples", [7, 8, 9, 200])
def test_fewer_rows_have_the_same_products(samples: int) -> None:
    rows = torch.randn(3, samples, 8)
    found = same_gram(rows)
    assert found.shape == (3, min(samples, 8), 8)
    wanted = rows.transpose(1, 2) @ rows
    assert (found.transpose(1, 2) @ found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_dead_channels_have_finite_scales() -> None:
    weight, rows = skewed(0, 4, 16, 8)
    rows[:, 3] = 0
    found = search_scale(weight, rows, rows.abs().mean(0), format_of(4, 0, True))
    assert bool((found.scale.isfinite() & (found.scale > 0)).all())
    silent = search_scale(weight, torch.zeros_like(rows), torch.zeros(16), format_of(4, 0, True))
    assert torch.equal(silent.scale, torch.ones(16))
    assert silent.error == 0
    clip = search_clip(weight, torch.zeros_like(rows), format_of(4, 0, True), group=0)
    assert torch.equal(clip, torch.ones(4, 1))  # nothing speaks for a clip


def test_chunks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, rows = skewed(2, 11, 16, 20)
    requantize = format_of(4, 8, False)
    whole = search_scale(weight, rows, rows.abs().mean(0), requantize)
    clip = search_clip(weight, rows, requantize, group=8)
    monkeypatch.setattr(grid, "CHUNK", 48)  # three rows
    assert [part.stop for part in grid.row_chunks(weight)] == [3, 6, 9, 11]
    parts = search_scale(weight, rows, rows.abs().mean(0), requantize)
    assert torch.equal(parts.scale, whole.scale)
    assert parts.error == pytest.approx(whole.error, rel=1e-6)
    assert torch.equal(search_clip(weight, rows, requantize, group=8), clip)
