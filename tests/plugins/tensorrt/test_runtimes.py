"""TensorRT's own runtimes over the plugin library: they load it, make plugins, and RTX builds an engine, without a GPU.

Each runs in a process of its own. RTX's parser looks its library up by a name that the wheel lacks, and must find the
very file that the bindings have loaded; a link in a folder on LD_LIBRARY_PATH gives it.
"""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnx
import pytest

from plugins import OPS, toolchain
from plugins.op import DOMAIN
from tests.plugins.tensorrt import graphs, nodes
from tests.plugins.tensorrt.nodes import NODES
from tests.plugins.tools import made

RUNTIMES = {
    "lean-10.16": "tensorrt_lean_bindings",
    "lean-11.4": "tensorrt_lean_bindings",
    "rtx-1.7": "tensorrt_rtx_bindings",
}
PROFILES = [{"B": 2, "Q": 96}, {"B": 1, "Q": 32}]
Asked = Callable[..., tuple[dict[str, Any], str]]


@pytest.fixture
def ask(plugin_library: Path, tmp_path: Path) -> Asked:
    def run(runtime: str, *words: str, library: Path = plugin_library) -> tuple[dict[str, Any], str]:
        folder = made(lambda: toolchain.fetched(runtime))
        links = tmp_path / "links"
        links.mkdir(exist_ok=True)
        for file in folder.glob("tensorrt_rtx_libs/libtensorrt_rtx.so.*"):
            if not (links / "libtensorrt_rtx.so").exists():
                (links / "libtensorrt_rtx.so").symlink_to(file)
        command: Sequence[str | Path] = (
            sys.executable, Path(__file__).with_name("runtime.py"), RUNTIMES[runtime], library, *words
        )  # fmt: skip
        paths = {"PYTHONPATH": str(folder), "LD_LIBRARY_PATH": str(links), "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(command, env={**os.environ, **paths}, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        *log, answer = done.stdout.splitlines()  # the runtimes log there, too
        return json.loads(answer), "\n".join([*log, done.stderr])

    return run


@pytest.mark.parametrize("op", NODES)
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_every_runtime_loads_the_library_and_makes_plugins(ask: Asked, runtime: str, op: str) -> None:
    node = NODES[op]()
    answer, errors = ask(runtime, "create", node.plugin, json.dumps(node.attributes))
    assert answer["made"], errors
    assert answer["fields"] == list(OPS[op].attribute_names)
    assert set(answer["found"]) == {op.onnx_type for op in OPS.values() if op.onnx_type and not op.inlined}


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_every_runtime_is_refused_a_plugin_of_wrong_fields(ask: Asked, runtime: str) -> None:
    answer, errors = ask(runtime, "create", "DllmcHead", json.dumps({"top_k": 4, "layout": 0}))
    assert not answer["made"]
    assert "dllmc: DllmcHead node: layout: got 0, expected 1\n" in errors


def built(ask: Asked, model: onnx.ModelProto, folder: Path, **more: Path) -> tuple[dict[str, Any], str]:
    onnx.save(model, folder / "model.onnx")
    return ask("rtx-1.7", "build", str(folder / "model.onnx"), json.dumps(PROFILES), **more)


def test_every_dllmc_node_is_a_plugin_layer_of_the_engine(ask: Asked, tmp_path: Path) -> None:
    model = graphs.block()
    ours = [node for node in model.graph.node if node.domain == DOMAIN]
    assert {node.op_type for node in ours} == {op.onnx_type for op in OPS.values() if op.onnx_type and not op.inlined}
    answer, errors = built(ask, model, tmp_path)
    assert answer["plugins"] == [node.name for node in ours], errors
    assert answer["outputs"] == [output.name for output in model.graph.output]
    engine = (tmp_path / "model.engine").read_bytes()
    weights = [tensor for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.INT8]
    assert len(weights) == 6
    assert all(tensor.raw_data in engine for tensor in weights), "constants are the packed bytes"
    assert engine.count(b"dllmcTRT") >= len(ours)


def test_types_and_shapes_are_those_that_the_library_says(ask: Asked, tmp_path: Path) -> None:
    answer, errors = built(ask, graphs.block(), tmp_path)
    expected = {
        "q1.codes": ["INT8", [-1, -1, graphs.D // 2]],
        "q1.scale": ["FLOAT", [-1, -1, 1]],
        "query.y": ["HALF", [-1, -1, graphs.D]],
        "turn.y": ["HALF", [-1, -1, graphs.D]],
        "q2.zero": ["INT32", [-1, -1, 1]],
        "output.y": ["FLOAT", [-1, -1, graphs.D]],
        "q3.codes": ["INT8", [-1, -1, graphs.D]],
        "gate_up.y": ["HALF", [-1, -1, graphs.F]],
        "q4.scale": ["FLOAT", [-1, -1, graphs.F // 128]],
        "down.y": ["FLOAT", [-1, -1, graphs.D]],
        "wide.y": ["FLOAT", [-1, -1, graphs.D]],
        "head.top_ids": ["INT64", [-1, -1, 4]],
        "head.tail": ["FLOAT", [-1, -1]],
    }
    assert {name: answer["tensors"].get(name) for name in expected} == expected, errors


def test_an_attribute_that_is_missing_stops_the_parser(ask: Asked, tmp_path: Path) -> None:
    model = graphs.block()
    node = next(node for node in model.graph.node if node.name == "down")
    kept = [attribute for attribute in node.attribute if attribute.name != "layout"]
    del node.attribute[:]
    node.attribute.extend(kept)
    answer, errors = built(ask, model, tmp_path)
    assert "errors" in answer
    assert "dllmc: DllmcInt4Linear down: layout: got no such field, expected an integer\n" in errors


def test_sizes_that_do_not_fit_stop_the_builder(ask: Asked, tmp_path: Path) -> None:
    model = graphs.block()
    bias = next(tensor for tensor in model.graph.initializer if tensor.name == "query.bias")
    bias.dims[0], bias.raw_data = graphs.D // 2, bias.raw_data[: 2 * graphs.D]
    answer, errors = built(ask, model, tmp_path)
    assert answer["plugins"]
    assert (tmp_path / "model.engine").read_bytes() == b""
    assert f"dllmc: DllmcInt4Linear query: bias: got {graphs.D // 2} at axis 0, expected {graphs.D}\n" in errors


def test_the_library_for_gpus_loads_and_builds_without_one(ask: Asked, tmp_path: Path) -> None:
    shipped = made(lambda: toolchain.build_plugin(platform.machine()))
    node = nodes.quantize_node()
    for runtime in RUNTIMES:
        answer, errors = ask(runtime, "create", node.plugin, json.dumps(node.attributes), library=shipped)
        assert answer["made"], errors
    model = graphs.block()
    by_cpu, _ = built(ask, model, tmp_path)
    (tmp_path / "model.engine").unlink()
    by_gpu, errors = built(ask, model, tmp_path, library=shipped)
    assert by_gpu == by_cpu, errors
    assert (tmp_path / "model.engine").stat().st_size > 0
