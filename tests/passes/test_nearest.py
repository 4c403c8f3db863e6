"""Round to nearest against a slow textbook loop, and what holds of every code and scale."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from passes.solvers import grid as grids
from passes.solvers.nearest import round_to_nearest
from tests.passes.grids import textbook_nearest, values

ROWS, INNER = 3, 8
FORMATS = st.fixed_dictionaries(
    {"bits": st.sampled_from([2, 3, 4, 8]), "group": st.sampled_from([0, 2, 4, 8]), "symmetric": st.booleans()}
)
ORDINARY = st.one_of(
    st.floats(-(2.0**10), 2.0**10, width=32),
    st.integers(-14, 14).map(lambda n: n / 2),
    st.just(0.0),
    st.sampled_from([2.0**-140, -22 * 2.0**-149]),  # a step that rounds to two thirds of itself
)
WEIGHTS = arrays(np.float32, (ROWS, INNER), elements=ORDINARY)
RATIOS = arrays(np.float32, (ROWS, INNER), elements=st.floats(0.25, 1, width=32))


@given(WEIGHTS, FORMATS, st.one_of(st.none(), RATIOS))
def test_equals_the_textbook(weight: np.ndarray, form: dict[str, int], ratios: np.ndarray | None) -> None:
    clip = None if ratios is None else ratios[:, : INNER // (form["group"] or INNER)].copy()
    ratio = None if clip is None else torch.from_numpy(clip)
    found = round_to_nearest(torch.from_numpy(weight), clip=ratio, **form)
    codes, scale, zero = textbook_nearest(weight, **form, clip=clip)
    assert (found.codes.dtype, found.scale.dtype) == (torch.int8, torch.float32)
    assert np.array_equal(found.codes.numpy(), codes)
    assert np.array_equal(found.scale.numpy(), scale)
    if form["symmetric"]:
        assert found.zero is None
    else:
        assert found.zero is not None and found.zero.dtype == torch.int8
        assert np.array_equal(found.zero.numpy(), zero)


@given(arrays(np.float32, (ROWS, INNER), elements=st.floats(-100, 100, width=16)), FORMATS)
def test_error_is_at_most_half_a_step(weight: np.ndarray, form: dict[str, int]) -> None:
    found = round_to_nearest(torch.from_numpy(weight), **form)
    steps = found.scale.double().repeat_interleave(form["group"] or INNER, dim=1)
    error = (torch.from_numpy(weight).double() - values(found)).abs()
    # x / s and s are rounded once each: 2^-24 of at most 255 steps, twice. A rounded zero may move an end by half a
    # step out of the range, where codes are cut.
    half = 0.5 if form["symmetric"] else 1.0
    assert bool((error <= steps * (half + 255 * 2**-23)).all())
    if form["symmetric"]:
        peak = found.codes.reshape(ROWS, -1, form["group"] or INNER).abs().amax(dim=-1)
        assert bool(((peak == 2 ** (form["bits"] - 1) - 1) | (peak == 0)).all())


@given(WEIGHTS, FORMATS)
def test_zero_weights_stay_zero(weight: np.ndarray, form: dict[str, int]) -> None:
    kept = torch.from_numpy(weight)
    assert bool((values(round_to_nearest(kept, **form))[kept == 0] == 0).all())


@given(WEIGHTS, st.sampled_from([2, 3, 4, 8]), st.sampled_from([0, 2, 4, 8]))
def test_a_negated_weight_has_negated_codes(weight: np.ndarray, bits: int, group: int) -> None:
    found = round_to_nearest(torch.from_numpy(weight), bits=bits, group=group)
    negated = round_to_nearest(torch.from_numpy(-weight), bits=bits, group=group)
    assert torch.equal(negated.codes, -found.codes)
    assert torch.equal(negated.scale, found.scale)


def test_ties_go_to_even() -> None:
    found = round_to_nearest(torch.tensor([[7.0, 0.5, 1.5, -2.5, 6.5, -0.5]]), bits=4, group=0)
    assert found.scale.tolist() == [[1.0]]
    assert found.codes.tolist() == [[7, 0, 2, -2, 6, 0]]


def test_a_skewed_row_uses_all_levels_with_a_zero() -> None:
    found = round_to_nearest(torch.tensor([[-1.0, 0.0, 14.0]]), bits=4, group=0, symmetric=False)
    assert found.zero is not None
    assert (found.scale.tolist(), found.zero.tolist()) == ([[1.0]], [[-7]])
    assert found.codes.tolist() == [[-8, -7, 7]]


def test_a_row_or_group_of_zeros_has_scale_one() -> None:
    weight = torch.tensor([[0.0, 0.0, 3.5, -7.0]])
    found = round_to_nearest(weight, bits=4, group=2)
    assert found.scale.tolist() == [[1.0, 1.0]]
    assert found.codes.tolist() == [[0, 0, 4, -7]]
    assert values(round_to_nearest(weight, bits=4, group=2, symmetric=False))[0, :2].tolist() == [0, 0]


def test_half_weights_are_widened_first() -> None:
    weight = torch.randn(4, 6).to(torch.bfloat16)
    found, expected = (round_to_nearest(each, bits=4, group=3) for each in (weight, weight.float()))
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.scale, expected.scale)


@pytest.mark.parametrize("chunk", [1, 7, 16, 40])
def test_rows_in_chunks_are_rows_at_once(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, clip = torch.randn(9, 8), torch.rand(9, 2)
    form = {"bits": 4, "group": 4, "symmetric": False, "clip": clip}
    expected = round_to_nearest(weight, **form)
    monkeypatch.setattr(grids, "CHUNK", chunk)
    found = round_to_nearest(weight, **form)
    assert torch.equal(values(found), values(expected))


def test_group_must_divide_the_width() -> None:
    with pytest.raises(RuntimeError):
        round_to_nearest(torch.ones(2, 6), bits=4, group=4)


def test_shapes_on_the_meta_device() -> None:
    for symmetric in (True, False):
        found = round_to_nearest(torch.empty(5, 8, device="meta"), bits=4, group=2, symmetric=symmetric)
        assert (found.codes.shape, found.scale.shape) == ((5, 8), (5, 4))
        assert found.codes.is_meta
        assert (found.zero is None) == symmetric
