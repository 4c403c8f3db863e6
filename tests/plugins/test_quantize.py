"""quantize: textbook loops = torch = ONNX Runtime body; equal integers but where a float64 sum may round either way."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from plugins.int4 import code_limit
from plugins.quantize import quantize

Arrays = dict[str, NDArray[Any]]
F = np.float32


def textbook_grid(row: NDArray[Any], bits: int, symmetric: bool, lo: float, hi: float) -> tuple[list[int], Any, int]:
    """The grid of the design for one row, one float32 operation at a time."""
    limit = code_limit(bits)
    if symmetric:
        scale = max(abs(x) for x in row) * F(hi) / F(limit)
        scale = scale if scale > 0 else F(1)
        return [int(np.clip(np.rint(x / scale), -limit, limit)) for x in row], scale, 0
    high, low = max(F(0), *row) * F(hi), min(F(0), *row) * F(lo)
    scale = (high - low) / F(2 * limit)
    scale = scale if scale > 0 else F(1)
    zero = np.rint((high + low) / (F(2) * scale))
    return [int(np.clip(np.rint(x / scale) - zero, -limit, limit)) for x in row], scale, int(zero)


def textbook(x: NDArray[Any], bits: int, symmetric: bool, a_group: int, lo: float, hi: float) -> Arrays:
    rows = x.reshape(-1, a_group or x.shape[-1])
    found = [textbook_grid(row, bits, symmetric, lo, hi) for row in rows]
    shape = (*x.shape[:-1], -1)
    codes = np.array([f[0] for f in found], dtype=np.int8).reshape(x.shape)
    result = {"codes": codes, "scale": np.array([f[1] for f in found], dtype=F).reshape(shape)}
    if not symmetric:
        result["zero"] = np.array([f[2] for f in found], dtype=np.int32).reshape(shape)
    return result


def hard_rows(rows: int, inner: int, seed: int = 0) -> NDArray[Any]:
    """Gaussian rows with outliers, then a zero row, an all-negative and an all-positive one, ties and tiny values."""
    rng = np.random.default_rng([seed, rows, inner])
    x = rng.standard_normal((rows, inner)) * rng.choice([0.01, 1, 50], (rows, inner), p=[0.2, 0.75, 0.05])
    special = [np.zeros(inner), -rng.uniform(1, 2, inner), rng.uniform(1, 2, inner), np.arange(inner) % 15 - 7.0]
    special += [(np.arange(inner) % 15 - 7.0) / 2, np.full(inner, 1e-44), np.full(inner, -1e30)]
    special += [np.arange(inner) % 29 / 2 - 4]  # halves between steps of size 1 around an odd zero
    return np.concatenate([x, np.stack(special)]).astype(F)


def assert_equal(found: Arrays, expected: Arrays) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        assert np.array_equal(found[name], array), name


def assert_near(found: Arrays, expected: Arrays, share: float = 1e-3) -> None:
    """Codes differ by at most 1, in at most `share` of places; scales by the rounding of a norm (4 ulp)."""
    assert (np.abs(found["scale"] - expected["scale"]) <= np.abs(expected["scale"]) * 2.0**-21).all()
    difference = np.abs(found["codes"].astype(int) - expected["codes"].astype(int))
    assert difference.max() <= 1
    assert np.mean(difference > 0) <= share


@pytest.mark.parametrize(("lo", "hi"), [(1.0, 1.0), (0.9, 0.8)])
@pytest.mark.parametrize("a_group", [0, 16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_equals_textbook_and_body(bits: int, symmetric: bool, a_group: int, lo: float, hi: float, both: Any) -> None:
    x = hard_rows(9, 48)
    attributes = {"bits": bits, "symmetric": symmetric, "a_group": a_group, "clip_lo": lo, "clip_hi": hi}
    reference, body = both("quantize", attributes, {"x": x})
    assert_equal(reference, textbook(x, bits, symmetric, a_group, lo, hi))
    assert_equal(body, reference)


@pytest.mark.parametrize("shape", [(1, 64), (37, 64), (2, 5, 64), (1, 1, 64)])
def test_any_leading_axes(shape: tuple[int, ...], both: Any) -> None:
    x = np.random.default_rng(1).standard_normal(shape).astype(F)
    for a_group in (0, 32):
        for symmetric in (True, False):
            reference, body = both("quantize", {"a_group": a_group, "symmetric": symmetric}, {"x": x})
            assert reference["scale"].shape == (*shape[:-1], 64 // a_group if a_group else 1)
            assert_equal(body, reference)


ROWS = hnp.arrays(
    F, st.tuples(st.integers(1, 3), st.integers(1, 9)), elements=st.floats(-(2.0**100), 2.0**100, width=32)
)


@settings(max_examples=50, deadline=None)
@given(ROWS, st.sampled_from([4, 8]), st.booleans())
def test_codes_stay_in_range_and_near(x: NDArray[Any], bits: int, symmetric: bool) -> None:
    codes, scale, zero = quantize(torch.from_numpy(x), bits=bits, symmetric=symmetric)
    limit = code_limit(bits)
    assert codes.abs().max() <= limit and (scale > 0).all()
    steps = codes.double() if symmetric else codes.double() + zero.double()
    error = (steps * scale.double() - torch.from_numpy(x).double()).abs()
    # Half a step, one more when the integer zero shifts a range's end out of the codes, and float32 rounding.
    tolerance = scale.double() * (0.5 if symmetric else 1.0) * (1 + 2.0**-12) + 2.0**-140
    assert (error <= tolerance).all()


def norm_inputs(rows: int, inner: int) -> Arrays:
    rng = np.random.default_rng([7, rows, inner])
    return {
        "x": (rng.standard_normal((rows, inner)) * 3).astype(F),
        "norm_weight": rng.uniform(0.2, 2, inner).astype(F),
        "channel_scale": rng.uniform(0.5, 2, inner).astype(F),
    }


@pytest.mark.parametrize("eps", [1e-5, 1e-6, 0.5])
@pytest.mark.parametrize("rows", [1, 37])
def test_norm_and_channel_scale(rows: int, eps: float, both: Any) -> None:
    inputs = norm_inputs(rows, 192)
    wide = inputs["x"].astype(np.float64)
    root = np.sqrt((wide**2).mean(-1, keepdims=True) + float(F(eps))).astype(F)
    y = inputs["x"] / root * inputs["norm_weight"] * inputs["channel_scale"]
    reference, body = both("quantize", {"bits": 8, "eps": eps}, inputs)
    assert_near(reference, textbook(y, 8, True, 0, 1, 1))
    assert_near(body, reference)


def test_body_of_a_norm_gives_equal_codes_almost_always(both: Any) -> None:
    """The mean is summed in float64, so the order of the sum hardly ever reaches a code."""
    inputs = {key: value for key, value in norm_inputs(200, 256).items() if key != "channel_scale"}
    for bits in (4, 8):
        reference, body = both("quantize", {"bits": bits}, inputs)
        assert_near(body, reference, share=1e-4)


def test_norm_of_a_zero_row(both: Any) -> None:
    inputs = {"x": np.zeros((2, 32), dtype=F), "norm_weight": np.ones(32, dtype=F)}
    for found in both("quantize", {}, inputs):
        assert not found["codes"].any() and (found["scale"] == 1).all()


def test_tac_is_a_block_affine(both: Any) -> None:
    rng = np.random.default_rng(3)
    x = rng.standard_normal((2, 5, 64)).astype(F)
    matrix, bias = rng.standard_normal((4, 16, 16)).astype(F), rng.standard_normal(64).astype(F)
    y = np.empty(x.shape)
    for block in range(4):
        part = slice(16 * block, 16 * block + 16)
        for b in range(2):
            for q in range(5):
                y[b, q, part] = matrix[block].astype(np.float64) @ x[b, q, part]
    expected = textbook(y.astype(F) + bias, 8, False, 0, 1, 1)
    reference, body = both(
        "quantize", {"bits": 8, "symmetric": False}, {"x": x, "tac_matrix": matrix, "tac_bias": bias}
    )
    assert_near(reference, expected)
    assert_near(body, reference)
    assert np.array_equal(body["zero"], reference["zero"])


def kronecker_inputs(a: int, b: int, shape: tuple[int, ...]) -> Arrays:
    rng = np.random.default_rng([a, b])
    left, right = (np.linalg.qr(rng.standard_normal((n, n)))[0].astype(F) for n in (a, b))
    return {"x": rng.standard_normal((*shape, a * b)).astype(F), "left": left, "right": right}


def test_transform_is_a_kronecker_product(both: Any) -> None:
    """x as a row vector times (left kron right)."""
    inputs = kronecker_inputs(8, 6, (3, 4))
    dense = np.kron(inputs["left"].astype(np.float64), inputs["right"].astype(np.float64))
    expected = textbook((inputs["x"] @ dense).astype(F), 8, True, 0, 1, 1)
    reference, body = both("quantize", {"bits": 8}, inputs)
    assert_near(reference, expected, share=2e-2)
    assert_near(body, reference)


@pytest.mark.parametrize(("gate_axis", "gate_size"), [(0, 1), (0, 2), (1, 1), (1, 3)])
def test_gate_zeroes_the_other_state(gate_axis: int, gate_size: int, both: Any) -> None:
    a, b = 8, 12
    inputs = kronecker_inputs(a, b, (2, 3))
    inputs["state"] = np.array([[1, 0, 1], [0, 0, 1]], dtype=np.int32)
    attributes = {"bits": 8, "gate_axis": gate_axis, "gate_size": gate_size}
    reference, body = both("quantize", attributes, inputs)
    assert_near(body, reference)
    tiles = np.moveaxis(reference["codes"].reshape(2, 3, a, b), 2 + gate_axis, 2)
    for state, tile in zip(inputs["state"].reshape(-1), tiles.reshape(6, *tiles.shape[2:]), strict=True):
        masked_slice, unmasked_slice = tile[-2 * gate_size : -gate_size], tile[-gate_size:]
        kept, dropped = (masked_slice, unmasked_slice) if state == 1 else (unmasked_slice, masked_slice)
        assert not dropped.any() and kept.any() and tile[: -2 * gate_size].any()


def test_gate_leaves_the_rest_alone(both: Any) -> None:
    inputs = kronecker_inputs(8, 12, (4,))
    gated = {**inputs, "state": np.array([1, 0, 1, 0], dtype=np.int32)}
    dense = np.kron(inputs["left"].astype(np.float64), inputs["right"].astype(np.float64))
    y = (inputs["x"] @ dense).astype(F).reshape(4, 8, 12)
    y[[0, 2], -1], y[[1, 3], -2] = 0, 0
    reference, _ = both("quantize", {"bits": 8, "gate_size": 1}, gated)
    assert_near(reference, textbook(y.reshape(4, 96), 8, True, 0, 1, 1), share=2e-2)


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize(("symmetric", "a_group"), [(True, 0), (False, 16)])
def test_everything_at_once(symmetric: bool, a_group: int, fold: bool, both: Any) -> None:
    rng = np.random.default_rng(11)
    inputs = {**norm_inputs(6, 96), **{k: v for k, v in kronecker_inputs(8, 12, (6,)).items() if k != "x"}}
    inputs |= {"tac_matrix": (np.eye(16) + rng.standard_normal((6, 16, 16)) * 0.1).astype(F)}
    inputs |= {"tac_bias": rng.standard_normal(96).astype(F) * F(0.1), "state": np.array([1, 0, 0, 1, 1, 0], np.int32)}
    attributes = {"symmetric": symmetric, "a_group": a_group, "gate_size": 1, "clip_hi": 0.95, "clip_lo": 0.9}
    reference, body = both("quantize", attributes, inputs, fold=fold)
    assert_near(body, reference, share=2e-3)


def test_onnx_reference_agrees(both: Any, by_onnx_reference: Callable[[str, dict[str, Any], Arrays], Arrays]) -> None:
    inputs = {**kronecker_inputs(8, 12, (4,)), "state": np.array([1, 0, 1, 0], dtype=np.int32)}
    for attributes in ({"bits": 8, "gate_size": 1}, {"bits": 4, "symmetric": False, "a_group": 16}):
        reference, _ = both("quantize", attributes, inputs)
        assert_near(by_onnx_reference("quantize", attributes, inputs), reference)


@pytest.mark.parametrize(
    ("names", "attributes", "message"),
    [
        (("x", "state"), {}, "give left and right with state"),
        (("x", "left"), {}, "come together; got no right"),
        (("x",), {"a_group": 7}, "a_group does not divide K; got 7"),
        (("x",), {"bits": 9}, "unsupported number of bits; got 9"),
        (("x", "left", "right", "state"), {"gate_axis": 2}, "gate_axis names a Kronecker factor; got 2"),
    ],
)
def test_refusals(names: tuple[str, ...], attributes: dict[str, Any], message: str) -> None:
    inputs = {**kronecker_inputs(8, 6, (4,)), "state": np.zeros(4, dtype=np.int32)}
    tensors = {name: torch.from_numpy(inputs[name]) for name in names}
    with pytest.raises(ValueError, match=message):
        torch.ops.dllmc.quantize(**tensors, **attributes)


def test_factors_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match="Kronecker factors do not fit; got 2 x 3"):
        quantize(torch.zeros(1, 8), left=torch.eye(2), right=torch.eye(3))
