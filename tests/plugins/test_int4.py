"""Packing of 4-bit codes."""

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from plugins.int4 import code_limit, codes_per_byte, pack_codes, pack_int4, unpack_codes, unpack_int4

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


@pytest.mark.parametrize("bits", range(2, 9))
def test_kernels_hold_two_codes_a_byte_of_at_most_4_bits(bits: int) -> None:
    limit = code_limit(bits)
    codes = torch.randint(-limit, limit + 1, (3, 2, 64), dtype=torch.int8)
    stored = pack_codes(codes, bits)
    assert stored.dtype == torch.int8 and stored.shape == (3, 2, 64 // codes_per_byte(bits))
    assert stored.numpy().tobytes() == (pack_int4(codes) if bits <= 4 else codes).numpy().tobytes()
    assert torch.equal(unpack_codes(stored, bits), codes)


@pytest.mark.parametrize(("codes", "message"), [([1, 2, 3], "two codes share a byte"), ([8, 0], "do not fit 4 bits")])
def test_refusals(codes: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack_int4(torch.tensor(codes, dtype=torch.int8))


def test_code_limit() -> None:
    assert [code_limit(bits) for bits in (3, 4, 8)] == [3, 7, 127]
    for bits in (1, 9):
        with pytest.raises(ValueError, match="unsupported number of bits"):
            code_limit(bits)
