"""dequantize: standard DequantizeLinear gives the torch result bit for bit."""

from typing import Any

import numpy as np
import pytest
import torch

from plugins.dequantize import dequantize
from plugins.int4 import code_limit


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("w_group", [0, 16])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_equals_textbook_and_standard_op(bits: int, w_group: int, fold: bool, both: Any) -> None:
    rng = np.random.default_rng(bits)
    limit, groups = code_limit(bits), 64 // w_group if w_group else 1
    codes = rng.integers(-limit, limit + 1, (6, 64)).astype(np.int8)
    w_scale = rng.uniform(0.01, 1, (6, groups)).astype(np.float32)
    reference, graph = both(
        "dequantize", {"bits": bits, "w_group": w_group}, {"codes": codes, "w_scale": w_scale}, fold
    )
    expected = codes.astype(np.float32) * np.repeat(w_scale, 64 // groups, axis=1)
    assert np.array_equal(reference["y"], expected)
    assert np.array_equal(graph["y"], expected)


def test_scales_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match="scales do not fit; got 3 of 4 columns, expected 16"):
        dequantize(torch.zeros(2, 16, dtype=torch.int8), torch.ones(2, 3), bits=4, w_group=4)
