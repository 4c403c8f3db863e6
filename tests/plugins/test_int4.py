"""Packing of 4-bit codes."""

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from plugins.int4 import code_limit, pack_int4, unpack_int4

CODES = hnp.arrays(
    np.int8, st.tuples(st.integers(0, 5), st.integers(0, 9).map(lambda half: 2 * half)), elements=st.integers(-8, 7)
)


@given(CODES)
def test_unpack_inverts_pack(codes: np.ndarray) -> None:
    packed = pack_int4(torch.from_numpy(codes))
    assert packed.dtype == torch.uint8 and packed.shape[-1] * 2 == codes.shape[-1]
    assert np.array_equal(unpack_int4(packed).numpy(), codes)


@given(CODES)
def test_bytes_are_those_of_onnx(codes: np.ndarray) -> None:
    packed = pack_int4(torch.from_numpy(codes)).numpy()
    assert packed.tobytes() == ir.Tensor(codes.astype(ml_dtypes.int4)).tobytes()


def test_even_k_stands_in_the_low_nibble() -> None:
    assert pack_int4(torch.tensor([[1, -1]], dtype=torch.int8)).tolist() == [[0xF1]]


@pytest.mark.parametrize(("codes", "message"), [([1, 2, 3], "two codes share a byte"), ([8, 0], "do not fit 4 bits")])
def test_refusals(codes: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack_int4(torch.tensor(codes, dtype=torch.int8))


def test_code_limit() -> None:
    assert [code_limit(bits) for bits in (3, 4, 8)] == [3, 7, 127]
    for bits in (1, 9):
        with pytest.raises(ValueError, match="unsupported number of bits"):
            code_limit(bits)
