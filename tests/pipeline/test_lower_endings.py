"""Graphs with other endings: the exported one up to there, on the same data file, no weights of their own."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from pipeline.backends.ort import session_options
from pipeline.backends.precheck import precheck
from pipeline.lower_endings import guided_model, save_beside, score_model
from plugins import attach_functions
from plugins.head import HEAD
from plugins.record import OUTPUTS, RECORD

FLOAT, INT8, INT64 = ir.DataType.FLOAT, ir.DataType.INT8, ir.DataType.INT64
V, K = 12, 16


def value(name: str, dtype: ir.DataType, *shape: int | str) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


def weight(name: str, array: np.ndarray) -> ir.Value:
    tensor = ir.Tensor(array, name=name)
    return ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)


def ending(fused: bool) -> ir.Model:
    """What the exporter leaves of a graph of one head, with a cache that only passes through."""
    bias, warm = value("logit_bias", FLOAT, V), value("inv_temp", FLOAT, "batch")
    index, past = value("head_index", INT64, "batch", "rows"), value("past_k_0", FLOAT, "batch", 1, "slots", 4)
    kept = ir.node("Identity", [past])
    kept.outputs[0].name, kept.outputs[0].type, kept.outputs[0].shape = "present_k_0", past.type, past.shape
    draw = np.random.default_rng(0)
    weights, nodes = [], [kept]
    if fused:
        codes, scale = value("codes", INT8, "batch", "rows", K), value("scale", FLOAT, "batch", "rows", 1)
        weights.append(weight("head.codes", draw.integers(-127, 128, (V, K)).astype(np.int8)))
        weights.append(weight("head.w_scale", draw.uniform(0.1, 0.2, (V, 1)).astype(np.float32)))
        entering = [codes, scale]
        names = ("codes", "scale", "weight", "w_scale", "logit_bias", "inv_temp")
        end = HEAD.node(dict(zip(names, [*entering, *weights, bias, warm], strict=True)), top_k=2)
    else:
        entering = [value("x", FLOAT, "batch", "rows", V)]
        weights.append(weight("gain", draw.uniform(1, 2, V).astype(np.float32)))
        product = ir.node("Mul", [entering[0], weights[0]])
        product.outputs[0].name = "product"
        nodes.append(product)
        names = ("logits", "logit_bias", "inv_temp")
        end = RECORD.node(dict(zip(names, [product.outputs[0], bias, warm], strict=True)), top_k=2)
    end.name = "end"
    for output, name in zip(end.outputs, OUTPUTS, strict=True):
        output.name, output.type = name, ir.TensorType(INT64 if name == "top_ids" else FLOAT)
        output.shape = ir.Shape(["batch", "rows", *([2] if name.startswith("top") else [])])
    graph = ir.Graph(
        [*entering, bias, warm, index, past],
        [*end.outputs, kept.outputs[0]],
        nodes=[*nodes, end],
        initializers=weights,
        opset_imports={"": 24, "dllmc": 1},
        name="ending",
    )
    return ir.Model(graph, ir_version=11)


def saved(folder: Path, fused: bool) -> Path:
    """model.onnx with its data, and score.onnx and guided.onnx made of it."""
    model = ending(fused)
    scored, guided = score_model(model), guided_model(model)
    attach_functions(model)
    ir.save(model, folder / "model.onnx", external_data="model.onnx.data", size_threshold_bytes=0)
    save_beside(scored, folder / "score.onnx", folder / "model.onnx")
    save_beside(guided, folder / "guided.onnx", folder / "model.onnx")
    return folder / "score.onnx"


def opened(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(path, session_options(1), ["CPUExecutionProvider"])


def rows_of(fused: bool, batch: int) -> dict[str, Any]:
    """Inputs of the endings but for the one that each has alone."""
    draw = np.random.default_rng(1)
    entering = {
        "codes": draw.integers(-127, 128, (batch, 3, K)).astype(np.int8),
        "scale": np.ones((batch, 3, 1), np.float32),
    }
    return {
        **(entering if fused else {"x": draw.standard_normal((batch, 3, V)).astype(np.float32)}),
        "logit_bias": draw.standard_normal(V).astype(np.float32),
        "inv_temp": np.array([1.0, 0.5] * (batch // 2), np.float32),
        "head_index": np.zeros((batch, 3), np.int64),
        "past_k_0": np.ones((batch, 1, 5, 4), np.float32),
    }


@pytest.mark.parametrize("fused", [True, False], ids=["int8", "float"])
def test_it_ends_in_likelihoods_of_the_same_logits(fused: bool, tmp_path: Path) -> None:
    path = saved(tmp_path, fused)
    fed = rows_of(fused, 2)
    targets = np.random.default_rng(2).integers(0, V, (2, 3))
    exported = opened(tmp_path / "model.onnx")
    top_ids, top_logits, lse_t = exported.run(["top_ids", "top_logits", "lse_t"], fed)
    session = opened(path)
    assert [one.name for one in session.get_outputs()] == ["target_logp", "logits", "present_k_0"]
    log_p, logits, present = session.run(None, {**fed, "target_ids": targets})
    assert np.array_equal(np.take_along_axis(logits, top_ids, axis=-1), top_logits)
    asked = np.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    # lse_t was rounded to float32 once, the likelihood too.
    assert (np.abs(log_p - (asked * fed["inv_temp"][:, None] - lse_t)) <= 2.0**-22 * np.abs(lse_t)).all()
    assert (log_p < 0).all()
    assert np.array_equal(present, fed["past_k_0"])


@pytest.mark.parametrize("fused", [True, False], ids=["int8", "float"])
def test_it_records_guided_pairs(fused: bool, tmp_path: Path) -> None:
    scored = saved(tmp_path, fused)
    fed = rows_of(fused, 4)
    unbiased = {**fed, "logit_bias": np.zeros(V, np.float32), "target_ids": np.zeros((4, 3), np.int64)}
    (logits,) = opened(scored).run(["logits"], unbiased)
    strength = np.array([0.0, 1.5], np.float32)
    guided = logits[::2] + strength[:, None, None] * (logits[::2] - logits[1::2]) + fed["logit_bias"]
    session = opened(scored.with_name("guided.onnx"))
    assert [one.name for one in session.get_outputs()] == [*OUTPUTS, "present_k_0"]
    assert session.get_outputs()[0].shape == ["pairs", "rows", 2]
    top_ids, top_logits, tail, _, lse_t, present = session.run(None, {**fed, "guidance": strength})
    assert np.array_equal(top_ids, np.argsort(-guided, axis=-1, kind="stable")[..., :2])
    assert np.array_equal(top_logits, np.take_along_axis(guided, top_ids, axis=-1))
    weight = np.exp(guided.astype(np.float64) - guided.max(-1, keepdims=True)).sum(-1)
    np.testing.assert_allclose(1 + tail, weight, rtol=2.0**-22)
    warm = guided.astype(np.float64) * fed["inv_temp"][::2, None, None]  # the prompt's row says how warm
    peak = warm.max(-1)
    np.testing.assert_allclose(lse_t, peak + np.log(np.exp(warm - peak[..., None]).sum(-1)), rtol=2.0**-22)
    assert present.shape == (4, 1, 5, 4)


@pytest.mark.parametrize("fused", [True, False], ids=["int8", "float"])
def test_it_holds_no_weights_of_its_own(fused: bool, tmp_path: Path) -> None:
    saved(tmp_path, fused)
    places = {}
    for name in ("model.onnx", "score.onnx", "guided.onnx"):
        precheck(tmp_path / name)
        proto = onnx.load(tmp_path / name, load_external_data=False)
        assert not any(tensor.raw_data for tensor in proto.graph.initializer)
        places[name] = {
            tensor.name: {entry.key: entry.value for entry in tensor.external_data}
            for tensor in proto.graph.initializer
        }
    assert places["score.onnx"] == places["guided.onnx"] == places["model.onnx"]
    assert len(list(tmp_path.iterdir())) == 4


def test_the_exported_graph_stays_as_it_was() -> None:
    model = ending(fused=True)
    before = ir.to_proto(model).SerializeToString()
    scored, guided = score_model(model), guided_model(model)
    assert ir.to_proto(model).SerializeToString() == before
    nodes = [[node.op_type for node in one.graph] for one in (scored, guided)]
    assert nodes[0] == ["Identity", "DllmcInt8Linear", "DllmcLogProbability"]
    assert nodes[1] == ["Identity", "DllmcInt8Linear", "DllmcGuide", "DllmcRecord"]


@pytest.mark.parametrize("fault", ["missing", "of another shape"])
def test_a_weight_that_is_not_in_the_data_file_is_a_fault(fault: str, tmp_path: Path) -> None:
    saved(tmp_path, fused=True)
    scored = score_model(ending(fused=True))
    codes = scored.graph.initializers["head.codes"]
    array = np.zeros((100, K), np.int8)
    codes.const_value = ir.Tensor(array, name="head.codes")
    codes.shape = ir.Shape(array.shape)
    if fault == "missing":
        codes.name = "head.other"
    with pytest.raises(ValueError, match=r"model\.onnx holds no weight head\."):
        save_beside(scored, tmp_path / "score.onnx", tmp_path / "model.onnx")
