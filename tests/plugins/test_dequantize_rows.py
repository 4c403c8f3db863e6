"""pack and dequantize_rows: the bytes of ONNX, the numbers of fake_quant, equal in torch and ONNX Runtime."""

from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from plugins.int4 import unpack_codes
from tests.plugins.conftest import Arrays, Both, build_model, call_reference, open_session

ops = torch.ops.dllmc
SHAPES = st.tuples(st.integers(0, 3), st.integers(1, 3), st.integers(1, 5).map(lambda half: 2 * half))


def in_both(name: str, attributes: dict[str, Any], inputs: Arrays) -> list[np.ndarray[Any, Any]]:
    """The one output in torch and in ONNX Runtime."""
    return [
        call_reference(name, attributes, inputs)["y"],
        open_session(build_model(name, attributes, inputs)).run(None, inputs)[0],
    ]


@settings(max_examples=40)
@given(codes=SHAPES.flatmap(lambda shape: hnp.arrays(np.int8, shape, elements=st.integers(-8, 7))))
def test_pairs_are_packed_as_onnx_packs_them_and_unpacked_again(codes: np.ndarray[Any, Any]) -> None:
    ones = np.ones((*codes.shape[:-1], 1), np.float32)
    for packed in in_both("pack", {}, {"codes": codes}):
        assert (packed.dtype, packed.shape) == (np.int8, (*codes.shape[:-1], codes.shape[-1] // 2))
        assert packed.tobytes() == ir.Tensor(codes.astype(ml_dtypes.int4)).tobytes()
        for found in in_both("dequantize_rows", {"bits": 4}, {"codes": packed, "scale": ones}):
            assert np.array_equal(found, codes)


def test_every_byte_is_unpacked() -> None:
    codes = np.arange(-128, 128, dtype=np.int8).reshape(1, -1)
    scale = np.full((1, 1), 0.3, np.float32)
    expected = unpack_codes(torch.from_numpy(codes), 4).numpy() * scale
    for found in in_both("dequantize_rows", {"bits": 4}, {"codes": codes, "scale": scale}):
        assert np.array_equal(found, expected)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_what_was_stored_is_what_fake_quant_gives(both: Both, bits: int, symmetric: bool) -> None:
    x = torch.randn(2, 3, 5, 12) + 0.5
    x[0, 0, 0] = 0
    codes, scale, zero = ops.quantize(x, bits=bits, symmetric=symmetric)
    stored = {"codes": (ops.pack(codes) if bits == 4 else codes).numpy(), "scale": scale.numpy()}
    stored |= {} if symmetric else {"zero": zero.numpy()}
    expected = ops.fake_quant(x, bits, symmetric).numpy()
    for found in both("dequantize_rows", {"bits": bits}, stored):
        assert np.array_equal(found["y"], expected)
