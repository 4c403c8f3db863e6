"""dequantize: standard DequantizeLinear gives the torch result bit for bit."""

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from plugins.dequantize import dequantize
from plugins.int4 import code_range
from tests.plugins.conftest import build_model


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("w_group", [0, 16, 64])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_equals_textbook_and_standard_op(bits: int, symmetric: bool, w_group: int, fold: bool, both: Any) -> None:
    rng = np.random.default_rng(bits)
    (low, high), groups = code_range(bits, symmetric), 64 // w_group if w_group else 1
    inputs = {"codes": rng.integers(low, high + 1, (7, 64)).astype(np.int8)}
    inputs["w_scale"] = rng.uniform(0.01, 1, (7, groups)).astype(np.float32)
    if not symmetric:
        inputs["w_zero"] = rng.integers(low, high + 1, (7, groups)).astype(np.int8)
        inputs["codes"][0, 0], inputs["w_zero"][0, 0] = low, high
    reference, graph = both("dequantize", {"bits": bits, "w_group": w_group}, inputs, fold)
    zero = inputs.get("w_zero", np.zeros((7, groups), np.int8))
    wide_zero, wide_scale = (np.repeat(each, 64 // groups, axis=1) for each in (zero, inputs["w_scale"]))
    expected = (inputs["codes"].astype(np.float32) - wide_zero) * wide_scale
    assert np.array_equal(reference["y"], expected)
    assert np.array_equal(graph["y"], expected)


@pytest.mark.parametrize("w_group", [0, 16])
@pytest.mark.parametrize("bits", [4, 8])
def test_zeros_need_no_optimiser(bits: int, w_group: int) -> None:
    """An optimiser may compute on INT4 what no kernel of ONNX Runtime does."""
    groups = 64 // (w_group or 64)
    inputs = {
        "codes": np.full((7, 64), -3, np.int8),
        "w_scale": np.full((7, groups), 0.5, np.float32),
        "w_zero": np.full((7, groups), 5, np.int8),
    }
    model = build_model("dequantize", {"bits": bits, "w_group": w_group}, inputs)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    data = ir.to_proto(model).SerializeToString()
    (found,) = onnxruntime.InferenceSession(data, options, ["CPUExecutionProvider"]).run(None, {})
    assert np.array_equal(found, np.full((7, 64), -4, np.float32))


def test_scales_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match="scales do not fit; got 3 of 4 columns, expected 16"):
        dequantize(torch.zeros(2, 16, dtype=torch.int8), torch.ones(2, 3), bits=4, w_group=4)


def test_zeros_of_another_size_are_refused() -> None:
    codes, zero = torch.zeros(2, 16, dtype=torch.int8), torch.zeros(2, 1, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"zeros do not fit; got \(2, 1\), expected \(2, 4\)"):
        dequantize(codes, torch.ones(2, 4), bits=4, w_group=4, w_zero=zero)
