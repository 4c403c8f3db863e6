"""int4_linear and int8_linear: textbook loops = torch = ONNX Runtime body = onnx.reference."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from plugins import int4_linear, int8_linear
from plugins.int4 import code_limit

Arrays = dict[str, NDArray[Any]]
F = np.float32


def draw(a_bits: int, w_bits: int, m: int, n: int, k: int, a_groups: int, w_groups: int, seed: int) -> Arrays:
    rng = np.random.default_rng([seed, m, n, k])
    a_limit, w_limit = code_limit(a_bits), code_limit(w_bits)
    return {
        "codes": rng.integers(-a_limit, a_limit + 1, (m, k)).astype(np.int8),
        "scale": rng.uniform(0.01, 1, (m, a_groups)).astype(F),
        "weight": rng.integers(-w_limit, w_limit + 1, (n, k)).astype(np.int8),
        "w_scale": rng.uniform(0.001, 0.1, (n, w_groups)).astype(F),
    }


def add_zero(inputs: Arrays, a_bits: int, num_groups: int) -> None:
    rng = np.random.default_rng(1)
    limit = code_limit(a_bits)
    inputs["zero"] = rng.integers(-limit, limit + 1, inputs["scale"].shape).astype(np.int32)
    n, k = inputs["weight"].shape
    inputs["w_sum"] = inputs["weight"].reshape(n, num_groups, k // num_groups).sum(-1, dtype=np.int32)


def textbook(inputs: Arrays, a_group: int, w_group: int) -> NDArray[Any]:
    """The formula one element at a time: Python integers for the sums, one float32 rounding an operation."""
    codes, weight = inputs["codes"], inputs["weight"]
    size = a_group or w_group or codes.shape[1]
    y = np.zeros((codes.shape[0], weight.shape[0]), dtype=F)
    for m in range(y.shape[0]):
        for n in range(y.shape[1]):
            total: np.float32 | None = None
            for group in range(codes.shape[1] // size):
                part = slice(group * size, (group + 1) * size)
                acc = sum(int(a) * int(w) for a, w in zip(codes[m, part], weight[n, part], strict=True))
                if "zero" in inputs:
                    zero = inputs["zero"][m, group if a_group else 0]
                    acc += int(zero) * int(sum(int(w) for w in weight[n, part]))
                term = F(acc) * inputs["w_scale"][n, group if w_group else 0]
                term = term * inputs["scale"][m, group] if a_group else term
                total = term if total is None else total + term
            assert total is not None
            y[m, n] = total if a_group else total * inputs["scale"][m, 0]
    y = y + inputs["bias"] if "bias" in inputs else y
    return y + inputs["residual"] if "residual" in inputs else y


@pytest.mark.parametrize("zero", [False, True], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize(("a_group", "w_group"), [(0, 0), (0, 16), (16, 0), (16, 16)])
@pytest.mark.parametrize(
    ("name", "a_bits"), [("int4_linear", 4), ("int4_linear", 8), ("int8_linear", 8), ("int8_linear", 4)]
)
def test_equals_textbook_and_body(name: str, a_bits: int, a_group: int, w_group: int, zero: bool, both: Any) -> None:
    w_bits, k = int(name[3]), 48
    groups = k // 16 if a_group or w_group else 1
    inputs = draw(a_bits, w_bits, 3, 6, k, groups if a_group else 1, groups if w_group else 1, seed=0)
    if zero:
        add_zero(inputs, a_bits, groups)
    inputs["bias"] = np.linspace(-1, 1, 6, dtype=F)
    inputs["residual"] = np.linspace(-3, 2, 18, dtype=F).reshape(3, 6)
    attributes = {"a_bits": a_bits, "w_bits": w_bits, "a_group": a_group, "w_group": w_group}
    reference, body = both(name, attributes, inputs)
    assert np.array_equal(reference["y"], textbook(inputs, a_group, w_group))
    assert np.array_equal(body["y"], reference["y"])


@pytest.mark.parametrize("rows", [1, 2, 7, 16, 37])
@pytest.mark.parametrize("name", ["int4_linear", "int8_linear"])
def test_body_is_exact_at_many_rows(name: str, rows: int, both: Any) -> None:
    bits = int(name[3])
    inputs = draw(bits, bits, rows, 33, 512, 1, 1, seed=2)
    add_zero(inputs, bits, 1)
    for fold in (True, False):
        reference, body = both(name, {}, inputs, fold=fold)
        assert np.array_equal(body["y"], reference["y"])


@pytest.mark.parametrize("name", ["int4_linear", "int8_linear"])
def test_extreme_codes_do_not_saturate(name: str, both: Any) -> None:
    """All codes at their limits: pairs of products would overflow 16 bits in a careless u8 x s8 kernel."""
    bits = int(name[3])
    inputs = draw(bits, bits, 2, 4, 1088, 1, 1, seed=0)
    limit = code_limit(bits)
    inputs["codes"][:] = limit
    inputs["weight"][:2], inputs["weight"][2:] = limit, -limit
    inputs["w_scale"][:] = inputs["scale"][:] = 1
    reference, body = both(name, {}, inputs)
    assert np.array_equal(np.abs(reference["y"]), np.full((2, 4), 1088 * limit * limit, dtype=F))
    assert np.array_equal(body["y"], reference["y"])


@pytest.mark.parametrize("num_groups", [2, 3, 8, 17, 32, 96])
@pytest.mark.parametrize("rows", [1, 5])
def test_groups_are_summed_in_ascending_order(num_groups: int, rows: int, both: Any) -> None:
    """ONNX does not promise an order to ReduceSum; the body relies on the one ONNX Runtime has."""
    inputs = draw(4, 4, rows, 10, num_groups * 4, 1, num_groups, seed=3)
    inputs["w_scale"] *= F(10.0) ** np.random.default_rng(0).integers(-4, 5, inputs["w_scale"].shape).astype(F)
    reference, body = both("int4_linear", {"w_group": 4}, inputs)
    assert np.array_equal(reference["y"], textbook(inputs, 0, 4))
    assert np.array_equal(body["y"], reference["y"])


@pytest.mark.parametrize("w_group", [0, 16])
@pytest.mark.parametrize("bias", [False, True])
def test_swiglu_pairs_rows(w_group: int, bias: bool, both: Any) -> None:
    inputs = draw(4, 4, 5, 12, 64, 1, 4 if w_group else 1, seed=4)
    if bias:
        inputs["bias"] = np.linspace(-1, 1, 12, dtype=F)
    reference, body = both("int4_linear", {"w_group": w_group, "swiglu": True}, inputs)
    y = textbook(inputs, 0, w_group)
    gate, up = y[:, 0::2].astype(np.float64), y[:, 1::2]
    expected = (gate / (1 + np.exp(-gate))).astype(F) * up
    # float64 exp is good to a few ulp everywhere, so silu rounds to the same float32 or its neighbour (2^-23).
    tolerance = np.abs(expected) * 2.0**-22
    assert (np.abs(reference["y"] - expected) <= tolerance).all()
    assert (np.abs(body["y"] - reference["y"]) <= tolerance).all()


def test_swiglu_of_large_gates_is_finite(both: Any) -> None:
    inputs = draw(4, 4, 2, 4, 32, 1, 1, seed=0)
    inputs["scale"][:] = 1e4
    for found in both("int4_linear", {"swiglu": True}, inputs):
        assert np.isfinite(found["y"]).all()


def test_leading_axes_are_kept(both: Any) -> None:
    for w_group in (0, 16):
        inputs = draw(4, 4, 6, 8, 32, 1, 2 if w_group else 1, seed=5)
        inputs["codes"] = inputs["codes"].reshape(2, 3, 32)
        inputs["scale"] = inputs["scale"].reshape(2, 3, 1)
        reference, body = both("int4_linear", {"w_group": w_group}, inputs)
        assert reference["y"].shape == (2, 3, 8)
        assert np.array_equal(body["y"], reference["y"])


@pytest.mark.parametrize("w_group", [0, 16])
@pytest.mark.parametrize("name", ["int4_linear", "int8_linear"])
def test_onnx_reference_agrees(
    name: str, w_group: int, both: Any, by_onnx_reference: Callable[[str, dict[str, Any], Arrays], Arrays]
) -> None:
    bits = int(name[3])
    inputs = draw(bits, bits, 4, 6, 64, 1, 4 if w_group else 1, seed=6)
    add_zero(inputs, bits, 4 if w_group else 1)
    reference, _ = both(name, {"w_group": w_group}, inputs)
    assert np.array_equal(by_onnx_reference(name, {"w_group": w_group}, inputs)["y"], reference["y"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layout": 3}, "unknown weight layout; got 3"),
        ({"a_group": 8, "w_group": 16}, "groups differ"),
        ({"w_group": 7}, "group size does not divide K; got 7"),
        ({"w_group": 8}, "w_scale does not fit; got 2 columns"),
    ],
)
def test_refusals(change: dict[str, Any], message: str) -> None:
    import torch

    inputs = {key: torch.from_numpy(value) for key, value in draw(4, 4, 2, 4, 32, 1, 2, seed=0).items()}
    op = torch.ops.dllmc.int4_linear
    with pytest.raises(ValueError, match=message):
        op(inputs["codes"], inputs["scale"], None, inputs["weight"], inputs["w_scale"], **change)


@pytest.mark.parametrize(("name", "most"), [("int4_linear", 2**17), ("int8_linear", 2**16)])
def test_the_largest_sum_with_a_zero_point_is_exact_and_no_larger_one_is_taken(name: str, most: int) -> None:
    """Every code and zero point at its limit: what is added to a sum is as large as the sum."""
    import torch

    op, limit = getattr(torch.ops.dllmc, name), code_limit(int(name[3]))

    def call(inner: int, **more: int) -> torch.Tensor:
        full = torch.full((1, inner), limit, dtype=torch.int8)
        groups = inner // more.get("w_group", inner)
        w_sum = torch.full((1, groups), limit * inner // groups, dtype=torch.int32)
        one, zero = torch.ones(1, 1), torch.full((1, 1), limit, dtype=torch.int32)
        return torch.as_tensor(op(full, one, zero, full, torch.ones(1, groups), w_sum, **more))

    assert call(most).item() == F(2 * limit * limit * most)
    assert call(2 * most, w_group=most).item() == F(4 * limit * limit * most)
    with pytest.raises(ValueError, match=f"does not fit int32; got {most + 64} codes of K, expected at most {most}"):
        call(most + 64)


def test_one_sum_for_several_groups_is_refused() -> None:
    import torch

    made = draw(4, 4, 2, 4, 32, 2, 1, seed=0)
    add_zero(made, 4, 1)
    i = {key: torch.from_numpy(value) for key, value in made.items()}
    with pytest.raises(ValueError, match="a sum a group; got 1 columns, expected 2"):
        torch.ops.dllmc.int4_linear(
            i["codes"], i["scale"], i["zero"], i["weight"], i["w_scale"], i["w_sum"], a_group=16
        )


def test_the_two_ops_share_one_signature() -> None:
    a, b = int4_linear.INT4_LINEAR.signature, int8_linear.INT8_LINEAR.signature
    assert list(a.parameters) == list(b.parameters)
