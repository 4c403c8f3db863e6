"""rotate: permutation, then block-diagonal rotation."""

from typing import Any

import numpy as np
import pytest

F = np.float32


@pytest.mark.parametrize(("shape", "inner", "block"), [((5,), 48, 16), ((2, 3), 64, 64), ((2, 4, 3), 32, 8)])
def test_equals_dense_matrix_and_body(shape: tuple[int, ...], inner: int, block: int, both: Any) -> None:
    rng = np.random.default_rng(inner)
    x = rng.standard_normal((*shape, inner)).astype(F)
    blocks = rng.standard_normal((inner // block, block, block)).astype(F)
    perm = rng.permutation(inner)
    dense = np.zeros((inner, inner))
    for index, square in enumerate(blocks):
        part = slice(index * block, (index + 1) * block)
        dense[part, part] = square
    expected = x[..., perm].astype(np.float64) @ dense
    for found in both("rotate", {}, {"x": x, "blocks": blocks, "perm": perm}):
        # Summed in float64 and rounded to float32 once: half an ulp, and what cancellation leaves of float64.
        assert found["y"].dtype == F
        assert (np.abs(found["y"] - expected) <= np.abs(expected) * 2.0**-23 + 1e-12).all()
