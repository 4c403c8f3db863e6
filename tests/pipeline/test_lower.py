"""The ONNX file: what stands in it, the same bytes every time, nothing of the machine that wrote it."""

import getpass
import os
import re
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from passes.add_cache import past_names, present_names
from pipeline.capture import INPUT_NAMES, OUTPUT_NAMES, materialise
from pipeline.errors import InputRefused
from pipeline.folder import MODEL, MODEL_DATA, read_job
from pipeline.lower import IR_VERSION, cached_graph, write_onnx
from pipeline.models.checkpoint import open_checkpoint
from pipeline.quantize import Weights, write_weights
from pipeline.recipe_file import load_recipe, parse_recipe
from plugins import OPS
from plugins.int4 import unpack_int4
from tests.pipeline.fitted import feeds_of, quick_recipe, random_checkpoint, random_states

ROOT = Path(__file__).parents[2]
Made = Callable[..., Path]
BLOCK = [
    "DllmcQuantize",
    "DllmcInt4Linear",
    "Attention",
    "DllmcQuantize",
    "DllmcInt4Linear",
    "DllmcQuantize",
    "DllmcInt4Linear",
    "DllmcQuantize",
    "DllmcInt4Linear",
]


@pytest.fixture(scope="module")
def bundle(exported: Made) -> Path:
    return exported("rtn-w4a4", "llada", tied=True)


@pytest.fixture(scope="module")
def proto(bundle: Path) -> onnx.ModelProto:
    return onnx.load(bundle / MODEL, load_external_data=False)


def test_versions_and_signature(proto: onnx.ModelProto, bundle: Path) -> None:
    onnx.checker.check_model(str(bundle / MODEL), full_check=False)
    assert proto.ir_version == IR_VERSION == 11
    assert {opset.domain: opset.version for opset in proto.opset_import} == {"": 24, "dllmc": 1}
    signature = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*proto.graph.input, *proto.graph.output)
    }
    inputs = (*INPUT_NAMES[:2], "write_start", *INPUT_NAMES[2:], *past_names(2))
    assert tuple(signature) == (*inputs, *OUTPUT_NAMES, *present_names(2, "in_place"))
    for name in (*past_names(2), *present_names(2, "in_place")):
        assert signature[name] == ["batch", 2, "slots", 16], name
    assert signature["input_ids"] == signature["position_ids"] == ["batch", "query"]
    assert signature["top_ids"] == signature["top_logits"] == ["batch", "rows", 8]
    assert signature["tail"] == signature["neg_entropy"] == signature["lse_t"] == ["batch", "rows"]
    assert 352 not in [size for name in OUTPUT_NAMES for size in signature[name]]  # no logits of the whole vocabulary


def test_a_block_is_eight_of_our_nodes_and_attention(proto: onnx.ModelProto) -> None:
    ours = [n.op_type for n in proto.graph.node if n.domain == "dllmc" or n.op_type == "Attention"]
    assert ours == [*BLOCK, *BLOCK, "DllmcQuantize", "DllmcHead"]
    floats = Counter(n.op_type for n in proto.graph.node)
    assert floats["MatMul"] == floats["Gemm"] == 0
    assert not [op for op in floats if "Sequence" in op]  # TensorRT has no sequences


def test_every_node_of_ours_says_all_about_itself(proto: onnx.ModelProto) -> None:
    by_type = {op.onnx_type: op for op in OPS.values()}
    bodies = {(f.domain, f.name, f.overload): f for f in proto.functions}
    used = set()
    for node in proto.graph.node:
        if node.domain != "dllmc":
            continue
        values = {attr.name: onnx.helper.get_attribute_value(attr) for attr in node.attribute}
        assert tuple(values) == (*by_type[node.op_type].attribute_names, "plugin_version", "plugin_namespace")
        assert (values["plugin_version"], values["plugin_namespace"]) == (b"1", b"dllmc")
        assert all(node.input)
        body = bodies[node.domain, node.op_type, node.overload]
        used.add((node.domain, node.op_type, node.overload))
        assert len(body.input) == len(node.input)
        assert all(inner.domain == "" for inner in body.node)
    assert used == bodies.keys()


def test_the_weights_are_those_of_the_sidecar_files(stages_done: Path) -> None:
    weights = Weights(stages_done / "weights")
    model = onnx.load(stages_done / MODEL)
    found = {tensor.name: tensor for tensor in model.graph.initializer}
    assert weights.names <= found.keys()
    for name in weights.names:
        value, expected = numpy_helper.to_array(found[name]), weights[name].numpy()
        assert np.array_equal(value.astype(expected.dtype), expected), name
        narrow = name.startswith("blocks.") and name.endswith(".codes")
        assert found[name].data_type == (onnx.TensorProto.INT4 if narrow else found[name].data_type)


def test_four_bit_codes_lie_packed_in_the_data_file(stages_done: Path) -> None:
    """Low nibble first, in one file beside the model, nothing in it that no weight reads."""
    weights = Weights(stages_done / "weights")
    model = onnx.load(stages_done / MODEL, load_external_data=False)
    data = (stages_done / MODEL_DATA).read_bytes()
    end = 0
    for tensor in model.graph.initializer:
        place = {entry.key: entry.value for entry in tensor.external_data}
        assert place["location"] == MODEL_DATA
        start, length = int(place["offset"]), int(place["length"])
        assert start >= end
        end = start + length
        if weights.is_packed(tensor.name):
            stored = torch.frombuffer(bytearray(data[start:end]), dtype=torch.uint8)
            shape = (tensor.dims[0], tensor.dims[1] // 2)
            assert torch.equal(unpack_int4(stored.reshape(shape)), weights[tensor.name])
            assert stored.numpy().tobytes() == weights.stored(tensor.name).numpy().tobytes()
    assert end == len(data)


def test_nothing_tells_where_it_was_made(bundle: Path, proto: onnx.ModelProto) -> None:
    content = (bundle / MODEL).read_bytes()
    strings = {text.decode() for text in re.findall(rb"[\x20-\x7e]{4,}", content)}
    for secret in (str(ROOT), str(bundle.parent), str(Path.home()), socket.gethostname(), "site-packages", ".py"):
        assert not any(secret in text for text in strings), secret
    assert not any(re.search(rf"\b{re.escape(getpass.getuser())}\b", text) for text in strings)
    assert (proto.producer_name, proto.producer_version, proto.doc_string) == ("dllmc", "", "")
    assert not proto.metadata_props
    for node in (*proto.graph.node, *(n for f in proto.functions for n in f.node)):
        assert not node.doc_string
        assert not node.metadata_props


AGAIN = """
import sys
from pathlib import Path
import torch
from pipeline.lower import write_onnx
from pipeline.models.checkpoint import open_checkpoint
from pipeline.quantize import Weights
from pipeline.folder import read_job
from pipeline.recipe_file import parse_recipe
model, output, weights, target, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
write_onnx(
    open_checkpoint(Path(model)).config, parse_recipe(read_job(Path(output))["recipe"], "recipe"),
    Weights(Path(weights)), Path(target), on_weight=lambda _: None,
)
"""


def test_another_process_writes_the_same_bytes(model: Made, stages_done: Path, tmp_path: Path) -> None:
    """With two threads and other hashes of strings."""
    folders = (model("llada", layers=1), stages_done.with_name("out"), stages_done / "weights", tmp_path / MODEL)
    words = [*map(str, folders), "2"]
    environment = os.environ | {"PYTHONHASHSEED": "77", "OMP_NUM_THREADS": "2"}
    subprocess.run([sys.executable, "-c", AGAIN, *words], cwd=ROOT, env=environment, check=True, timeout=120)
    for name in (MODEL, MODEL_DATA):
        assert (tmp_path / name).read_bytes() == (stages_done / name).read_bytes(), name


def test_a_mask_that_becomes_an_id_moves_one_row_before_attention(tmp_path: Path) -> None:
    """Gates by state: keys and values of the first layer come before any attention, those of the second after it."""
    checkpoint, recipe = random_checkpoint("llada", tmp_path), quick_recipe("freeact", (4, 4))
    states = random_states(checkpoint)
    write_weights(checkpoint, recipe, tmp_path / "weights", states=states, on_piece=lambda _: None)
    weights = Weights(tmp_path / "weights")
    graph = materialise(cached_graph(checkpoint.config, recipe, weights.numbers), weights.all())
    ids, *rest = (
        tensor[:1] if tensor.shape[0] == len(states.input_ids) else tensor for tensor in feeds_of(checkpoint, states)
    )
    position = int((ids[0] == checkpoint.config.mask_id).nonzero()[1])
    other = ids.clone()
    other[0, position] = 5
    empty = [torch.zeros(1, 2, ids.shape[1], 16) for _ in past_names(2)]
    start = torch.zeros(1, dtype=torch.long)
    kept = [graph(given, rest[0], start, *rest[1:], *empty)[-4:] for given in (ids, other)]
    moved = [(one != two).any(dim=3).any(dim=1)[0] for one, two in zip(*kept, strict=True)]
    assert [rows.nonzero().flatten().tolist() for rows in moved[:2]] == [[position], [position]]
    assert all(rows.sum() > 1 for rows in moved[2:])


@pytest.fixture
def arguments(model: Made, stages_done: Path) -> dict[str, Any]:
    recipe = parse_recipe(read_job(stages_done.with_name("out"))["recipe"], "the recorded recipe")
    return {"config": open_checkpoint(model("llada", layers=1)).config, "recipe": recipe, "on_weight": lambda _: None}


@pytest.mark.parametrize("fault", ["missing", "unused", "wrong shape"])
def test_weights_that_do_not_fit_are_refused(
    arguments: dict[str, Any], stages_done: Path, fault: str, tmp_path: Path
) -> None:
    folder = tmp_path / "weights"
    folder.mkdir()
    for path in (stages_done / "weights").iterdir():
        tensors = load_file(path)
        if path.stem == "blocks.0" and fault == "missing":
            del tensors["blocks.0.attn.o_proj.codes"]
        elif path.stem == "blocks.0" and fault == "unused":
            tensors["blocks.0.attn.extra"] = torch.zeros(1)
        elif path.stem == "blocks.0":
            tensors["blocks.0.attn_norm.weight"] = torch.ones(32)
        with safe_open(path, "pt") as file:
            save_file(tensors, folder / path.name, file.metadata())
    with pytest.raises(InputRefused, match=r"run `dllmc quantize` again"):
        write_onnx(weights=Weights(folder), path=tmp_path / MODEL, **arguments)
    assert not (tmp_path / MODEL).exists()


def test_debug_logits_add_an_output(arguments: dict[str, Any], stages_done: Path, tmp_path: Path) -> None:
    """And opset 23 is written where it is asked for, without what came later."""
    sets = ["debug_logits=true", "opset=23", "cache=window", "top_k=5"]
    arguments["recipe"] = load_recipe("rtn-w4a4", [f"lowering.{setting}" for setting in sets])
    told: list[str] = []
    arguments["on_weight"] = told.append
    nodes = write_onnx(weights=Weights(stages_done / "weights"), path=tmp_path / MODEL, **arguments)
    written = onnx.load(tmp_path / MODEL, load_external_data=False)
    assert [value.name for value in written.graph.output] == [*OUTPUT_NAMES, "logits", *present_names(1, "window")]
    assert {opset.domain: opset.version for opset in written.opset_import} == {"": 23, "dllmc": 1}
    assert not {node.op_type for node in written.graph.node} & {"TensorScatter"}
    assert nodes == {"DllmcQuantize": 5, "DllmcInt4Linear": 4, "DllmcInt8Linear": 1}
    assert sorted(told) == sorted(Weights(stages_done / "weights").names)
