"""integer_matmul is exact however large the sums, and its ONNX form cannot saturate on any processor."""

import numpy as np
import onnx_ir as ir
import pytest
import torch

from plugins.body import INT8, UINT8, Body
from plugins.integer_matmul import integer_matmul, write_matmul


@pytest.mark.parametrize(("a_bits", "w_bits", "inner"), [(4, 4, 300), (8, 4, 20_001), (8, 8, 1041), (8, 8, 20_001)])
def test_large_sums_are_exact(a_bits: int, w_bits: int, inner: int) -> None:
    """Codes near their limits, all of one sign: sums pass 2^24, beyond which float32 skips integers."""
    rng = np.random.default_rng(inner)
    codes = rng.integers(2 ** (a_bits - 1) - 4, 2 ** (a_bits - 1), (5, inner)).astype(np.int8)
    weight = rng.integers(2 ** (w_bits - 1) - 4, 2 ** (w_bits - 1), (7, inner)).astype(np.int8)
    found = integer_matmul(torch.from_numpy(codes), torch.from_numpy(weight), a_bits, w_bits)
    assert found.dtype == torch.int32
    assert np.array_equal(found.numpy(), codes.astype(np.int64) @ weight.astype(np.int64).T)


def test_rows_of_a_long_weight_are_joined_in_order() -> None:
    rng = np.random.default_rng(0)
    codes, weight = (rng.integers(-127, 128, (rows, 8)).astype(np.int8) for rows in (2, 20_000))
    found = integer_matmul(torch.from_numpy(codes), torch.from_numpy(weight), 8, 8)
    assert np.array_equal(found.numpy(), codes.astype(np.int64) @ weight.astype(np.int64).T)


@pytest.mark.parametrize(("a_bits", "w_bits", "weight_type"), [(4, 4, INT8), (8, 4, INT8), (4, 8, INT8), (8, 8, UINT8)])
def test_operand_types(a_bits: int, w_bits: int, weight_type: ir.DataType) -> None:
    """u8 x s8 of 8-bit codes saturates without VNNI, which a processor that has it does not show."""
    body = Body()
    write_matmul(body, ir.Value(name="codes"), ir.Value(name="weight"), a_bits, w_bits)
    (product,) = (node for node in body.nodes if node.op_type == "MatMulInteger")
    left, right = product.inputs[0], product.inputs[1]
    assert left is not None and right is not None
    transposed = right.producer()
    assert transposed is not None and transposed.inputs[0] is not None
    casts = [left.producer(), transposed.inputs[0].producer()]
    assert [node.attributes["to"].value for node in casts if node] == [UINT8, weight_type]
    assert len(product.inputs) == (4 if weight_type == UINT8 else 3)
