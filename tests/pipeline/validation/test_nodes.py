"""Each node alone: a right file passes, a file with one wrong weight fails and the node is named."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from pipeline.backends.backend import Feeds
from pipeline.capture import capture_whole, materialise
from pipeline.quantize import simulate
from pipeline.recipe_file import load_recipe
from pipeline.validation.nodes import CODE_SHARE, NodeCheck, check_nodes
from tests.pipeline.validation.conftest import Lowered, flip, spoil, swap

SITES = ["attn.q_k_v_proj", "attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"]


def inputs_of(lowered: Lowered) -> list[Feeds]:
    return [next(one for one in lowered.feeds if one.input_ids.shape == (3, 33))]


def failed(checks: list[NodeCheck]) -> list[str]:
    return [check.node for check in checks if not check.passed]


def test_every_node_of_a_right_file_passes(lowered: Lowered) -> None:
    checks = check_nodes(lowered.work / "model.onnx", lowered.graph, inputs_of(lowered))
    assert failed(checks) == []
    assert [check.op for check in checks] == [*["DllmcQuantize", "DllmcInt4Linear"] * 4, "DllmcQuantize", "DllmcHead"]
    assert [check.node for check in checks if "Linear" in check.op] == [f"blocks.0.{site}" for site in SITES]
    rows = 3 * 33
    assert [check.places for check in checks[:2]] == [rows * (64 + 1), rows * 128]
    for check in checks:
        if check.op == "DllmcInt4Linear" and "gate_up" not in check.node:
            assert check.largest == 0.0  # integers, and one order of float operations
        assert check.codes_off <= CODE_SHARE * check.places


@pytest.mark.parametrize(
    ("name", "nodes"),
    [
        ("blocks.0.attn.q_k_v_proj.codes", ["blocks.0.attn.q_k_v_proj"]),
        ("blocks.0.mlp.gate_up_proj.codes", ["blocks.0.mlp.gate_up_proj"]),
        ("head.codes", ["head"]),
    ],
)
def test_flipped_codes_are_found(lowered: Lowered, written: Path, name: str, nodes: list[str]) -> None:
    spoil(written, name, flip)
    assert failed(check_nodes(written, lowered.graph, inputs_of(lowered))) == nodes


@pytest.mark.parametrize("factor", [1 + 2.0**-12, -1.0, float("nan"), float("inf"), 0.0])
def test_a_changed_scale_is_found(lowered: Lowered, written: Path, factor: float) -> None:
    spoil(written, "blocks.0.attn.o_proj.w_scale", lambda view: view.__setitem__(5, view[5] * factor), np.float32)
    assert failed(check_nodes(written, lowered.graph, inputs_of(lowered))) == ["blocks.0.attn.o_proj"]


def test_swapped_weights_are_found(lowered: Lowered, written: Path) -> None:
    swap(written, "blocks.0.attn.o_proj.w_scale", "blocks.0.mlp.down_proj.w_scale")
    swap(written, "blocks.0.attn_norm.weight", "blocks.0.mlp_norm.weight")
    names = failed(check_nodes(written, lowered.graph, inputs_of(lowered)))
    assert [name for name in names if name.startswith("blocks")] == ["blocks.0.attn.o_proj", "blocks.0.mlp.down_proj"]
    assert len([name for name in names if name.startswith("DllmcQuantize before")]) == 2


@pytest.mark.parametrize("output", range(1, 5))  # the first holds ids, which `forced` compares
def test_nan_in_any_output_of_the_head_fails(lowered: Lowered, output: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's max hides NaN unless it comes first."""

    class Poisoned(onnxruntime.InferenceSession):  # type: ignore[misc]
        def run(self, *arguments: Any) -> list[Any]:
            results: list[Any] = super().run(*arguments)
            if len(results) == 5:
                results[output].ravel()[3] = np.nan
            return results

    monkeypatch.setattr(onnxruntime, "InferenceSession", Poisoned)
    names = failed(check_nodes(lowered.work / "model.onnx", lowered.graph, inputs_of(lowered)))
    assert names == ["head"]


@pytest.mark.parametrize("place", [0, 1])
def test_nan_in_a_scale_of_a_quantiser_fails(lowered: Lowered, place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class Poisoned(onnxruntime.InferenceSession):  # type: ignore[misc]
        def run(self, *arguments: Any) -> list[Any]:
            results: list[Any] = super().run(*arguments)
            if len(results) == 2:
                results[1].ravel()[place] = np.nan
            return results

    monkeypatch.setattr(onnxruntime, "InferenceSession", Poisoned)
    checks = check_nodes(lowered.work / "model.onnx", lowered.graph, inputs_of(lowered))
    assert [check.passed for check in checks] == [check.op != "DllmcQuantize" for check in checks]
    assert all(np.isnan(check.largest) for check in checks if check.op == "DllmcQuantize")


def test_counts_are_summed_over_passes(lowered: Lowered) -> None:
    one, other = inputs_of(lowered)[0], lowered.feeds[0]
    path = lowered.work / "model.onnx"
    separate = [check_nodes(path, lowered.graph, [feeds]) for feeds in (one, other)]
    both = check_nodes(path, lowered.graph, [one, other])
    assert [check.places for check in both] == [a.places + b.places for a, b in zip(*separate, strict=True)]
    assert failed(both) == []


def test_one_code_may_move_where_there_are_thousands(lowered: Lowered, monkeypatch: pytest.MonkeyPatch) -> None:
    """By one step, and not in a node that computes no floats before it rounds."""
    step = 1

    class Moved(onnxruntime.InferenceSession):  # type: ignore[misc]
        def run(self, *arguments: Any) -> list[Any]:
            results: list[Any] = super().run(*arguments)
            if len(results) == 2:
                results[0].ravel()[0] -= step * (1 if results[0].ravel()[0] > 0 else -1)
            return results

    monkeypatch.setattr(onnxruntime, "InferenceSession", Moved)
    checks = check_nodes(lowered.work / "model.onnx", lowered.graph, inputs_of(lowered))
    quantisers = [check.node for check in checks if check.op == "DllmcQuantize"]
    assert failed(checks) == [quantisers[1], quantisers[3]]  # of attention's and the MLP's inner values
    step = 2
    checks = check_nodes(lowered.work / "model.onnx", lowered.graph, inputs_of(lowered))
    assert failed(checks) == quantisers


def test_a_file_with_other_nodes_is_refused(lowered: Lowered) -> None:
    config = lowered.checkpoint.config
    graph = capture_whole(config, top_k=8)
    simulate(graph, load_recipe("fp16"), config)
    shapes = {name: torch.zeros(value.shape, dtype=value.dtype) for name, value in graph.state_dict().items()}
    with pytest.raises(ValueError, match="10 against 0"):
        check_nodes(lowered.work / "model.onnx", materialise(graph, shapes), inputs_of(lowered))
