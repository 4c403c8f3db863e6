"""A plugin's whole life as TensorRT leads it, over the kernels as host C++: outputs against the torch references."""

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench.gpu.bounds import rounding_of_floats, rounding_of_halves
from plugins import OPS, record, toolchain
from plugins.cuda_library import Device, HeadArgs, Launch
from plugins.layout import from_layout
from plugins.prepare import prepare
from tests.plugins.cuda.conftest import SHARED_BYTES
from tests.plugins.cuda.quantize_cases import assert_near, assert_rare
from tests.plugins.cuda.test_head import bounds
from tests.plugins.cuda.test_rotate import assert_near as assert_near_rotation
from tests.plugins.tensorrt.conftest import compile_plugins, kernel_objects
from tests.plugins.tensorrt.harness import DATA_TYPES, Harness, running
from tests.plugins.tensorrt.nodes import Node, head_node, linear_node, quantize_node, rotate_node
from tests.plugins.tools import made

F16, F32 = torch.float16, torch.float32
FLOAT, HALF, INT8, INT32, INT64 = 0, 1, 2, 3, 8


def live(harness: Harness, node: Node, folder: Path, **more: Any) -> tuple[dict[str, Any], list[np.ndarray]]:
    answer, outputs = harness.live(node.plugin, node.attributes, node.inputs, folder, **more)
    assert "failed" not in answer, (answer, harness.reasons)
    assert answer["plugin"] == "dllmc 1"
    assert answer["types"] == [DATA_TYPES[array.dtype] for array in node.expected]
    assert [tuple(shape) for shape in answer["shapes"]] == [array.shape for array in node.expected]
    return answer, outputs


def transform(inner: int, state: bool, lead: tuple[int, ...] = (2, 3)) -> dict[str, Any]:
    given: dict[str, Any] = {"left": torch.randn(8, 8), "right": torch.randn(inner // 8, inner // 8)}
    if state:
        given |= {"state": torch.randint(0, 2, lead, dtype=torch.int32), "gate_axis": 1, "gate_size": 1}
    return given


@pytest.mark.parametrize(
    "make",
    [
        lambda: quantize_node(),
        lambda: quantize_node(dtype=F16),
        lambda: quantize_node(lead=(5,), bits=8),
        lambda: quantize_node(lead=(), inner=256, a_group=128),
        lambda: quantize_node(symmetric=False, clip_lo=0.9, clip_hi=0.95),
        lambda: quantize_node(symmetric=False, a_group=128, inner=384, bits=8, dtype=F16),
        lambda: quantize_node(lead=(1, 2, 1, 3), inner=128),
        lambda: quantize_node(channel_scale=torch.rand(128) + 0.5),
    ],
)
def test_quantize_writes_the_references_codes(harness: Harness, tmp_path: Path, make: Any) -> None:
    node = make()
    _, outputs = live(harness, node, tmp_path)
    for found, expected in zip(outputs, node.expected, strict=True):
        assert np.array_equal(found, expected)


@pytest.mark.parametrize(
    ("rounding", "make"),
    [
        (rounding_of_floats, lambda: quantize_node(norm_weight=torch.rand(128), eps=1e-6)),
        (rounding_of_floats, lambda: quantize_node(tac_matrix=torch.randn(8, 16, 16), tac_bias=torch.randn(128))),
        (rounding_of_halves, lambda: quantize_node(**transform(128, state=False))),
        (rounding_of_floats,
         lambda: quantize_node(**transform(128, state=True), norm_weight=torch.rand(128), bits=8, dtype=F16)),
        (rounding_of_halves,
         lambda: quantize_node(**transform(128, state=True), norm_weight=torch.rand(128), symmetric=False,
                               channel_scale=torch.rand(128), tac_matrix=torch.randn(8, 16, 16),
                               tac_bias=torch.randn(128))),
    ],
)  # fmt: skip
def test_quantize_reads_every_optional_input(harness: Harness, tmp_path: Path, rounding: Any, make: Any) -> None:
    """What the kernels make of them is tested beside the kernels; here: the right tensor at the right place."""
    node = make()
    _, outputs = live(harness, node, tmp_path)
    names = OPS["quantize"].present(node.attributes)
    given: dict[str, Any] = dict(zip(names, map(torch.from_numpy, node.inputs), strict=True))
    given["eps"] = node.attributes["eps"]
    gate = {name: node.attributes[name] for name in ("gate_axis", "gate_size")}
    grid = {name: node.attributes[name] for name in ("bits", "symmetric", "a_group", "clip_lo", "clip_hi")}
    error = rounding(given["x"], given)
    apart = assert_near(tuple(map(torch.from_numpy, outputs)), prepare(**given, **gate), error, grid)
    assert_rare(apart)


@pytest.mark.parametrize("residual", [None, F16, F32])
@pytest.mark.parametrize("bits", [(4, 4), (8, 4), (8, 8)])
def test_linears_equal_the_reference(
    harness: Harness, tmp_path: Path, bits: tuple[int, int], residual: torch.dtype | None
) -> None:
    node = linear_node(a_bits=bits[0], w_bits=bits[1], bias=True, zero=True, residual=residual)
    _, outputs = live(harness, node, tmp_path)
    assert np.array_equal(outputs[0], node.expected[0])


@pytest.mark.parametrize(
    "make",
    [
        lambda: linear_node(inner=256, a_group=128, w_group=128, zero=True, residual=F32),
        lambda: linear_node(inner=256, w_group=128),
        lambda: linear_node(inner=256, a_group=128, bias=True),
        lambda: linear_node(lead=(), outputs=32),
        lambda: linear_node(lead=(70,), outputs=48),
        lambda: linear_node(a_bits=3, w_bits=2),
        lambda: linear_node(a_bits=6, w_bits=5),
    ],
)
def test_linears_equal_the_reference_in_every_form(harness: Harness, tmp_path: Path, make: Any) -> None:
    node = make()
    _, outputs = live(harness, node, tmp_path)
    assert np.array_equal(outputs[0], node.expected[0])


def test_swiglu_halves_the_outputs(harness: Harness, tmp_path: Path) -> None:
    node = linear_node(swiglu=True, bias=True, outputs=32)
    _, outputs = live(harness, node, tmp_path)
    steps = np.abs(outputs[0].view(np.int16).astype(np.int32) - node.expected[0].view(np.int16).astype(np.int32))
    assert steps.max() <= 1  # neighbouring halves: the exponential may differ in float32's last places


def test_head_writes_the_record(harness: Harness, tmp_path: Path) -> None:
    node = head_node()
    _, outputs = live(harness, node, tmp_path)
    assert np.array_equal(outputs[0], node.expected[0])
    assert np.array_equal(outputs[1], node.expected[1])
    names = ("codes", "scale", "weight", "w_scale", "logit_bias", "inv_temp")
    inputs = dict(zip(names, map(torch.from_numpy, node.inputs), strict=True))
    inputs["weight"] = from_layout(inputs["weight"], 1)
    sums = tuple(map(torch.from_numpy, node.expected[2:]))
    for found, expected, bound in zip(outputs[2:], sums, bounds(inputs, sums), strict=True):
        assert ((torch.from_numpy(found).double() - expected.double()).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [F16, F32])
def test_rotate_keeps_the_type_of_x(harness: Harness, tmp_path: Path, dtype: torch.dtype) -> None:
    node = rotate_node(dtype=dtype)
    _, outputs = live(harness, node, tmp_path)
    x, blocks, perm = map(torch.from_numpy, node.inputs)
    assert_near_rotation(torch.from_numpy(outputs[0]), x, blocks, perm, blocks.shape[-1])


FLOATING = [FLOAT, HALF]


@pytest.mark.parametrize(
    ("make", "formats"),
    [
        (lambda: quantize_node(), [FLOATING, [INT8], [FLOAT]]),
        (lambda: quantize_node(symmetric=False, **transform(128, state=True)),
         [FLOATING, [FLOAT], [FLOAT], [INT32], [INT8], [FLOAT], [INT32]]),
        (lambda: linear_node(zero=True, bias=True, residual=F32),
         [[INT8], [FLOAT], [INT32], [INT8], [FLOAT], [INT32], [FLOAT], FLOATING, [FLOAT]]),
        (lambda: linear_node(residual=F16), [[INT8], [FLOAT], [INT8], [FLOAT], FLOATING, [HALF]]),
        (lambda: linear_node(), [[INT8], [FLOAT], [INT8], [FLOAT], [HALF]]),
        (lambda: head_node(), [[INT8], [FLOAT], [INT8], [FLOAT], [FLOAT], [FLOAT], [INT64], *4 * [[FLOAT]]]),
        (lambda: rotate_node(), [FLOATING, [FLOAT], [INT64], [HALF]]),
    ],
)  # fmt: skip
def test_each_tensor_has_its_types_in_linear_format(
    harness: Harness, tmp_path: Path, make: Any, formats: list[list[int]]
) -> None:
    answer, _ = live(harness, make(), tmp_path)
    assert answer["formats"] == formats


def test_the_timing_id_tells_attributes_apart(harness: Harness, tmp_path: Path) -> None:
    ids = set()
    for node in (linear_node(), linear_node(bias=True), linear_node(a_bits=8), linear_node(swiglu=True, outputs=32)):
        answer, _ = live(harness, node, tmp_path)
        ids.add(answer["timing_id"])
        assert "layout=1" in answer["timing_id"]
    assert len(ids) == 4


def test_room_is_planned_for_the_largest_profile(harness: Harness, tmp_path: Path) -> None:
    node = head_node(batch=1, rows=3)
    small, _ = live(harness, node, tmp_path)
    largest = {0: (1, 64, 64), 1: (1, 64, 1)}
    large, outputs = live(harness, node, tmp_path, largest=largest)
    assert np.array_equal(outputs[0], node.expected[0])
    assert large["workspace"] > small["workspace"]


def test_room_is_enough_on_every_device_for_any_fewer_rows(harness: Harness, tmp_path: Path) -> None:
    """The head needs more for 192 rows than for 193: three tiles of rows share the blocks that four would."""
    vocabulary, most = 2720, 193
    node = head_node(batch=1, rows=1, vocabulary=vocabulary, top_k=1)
    room: int = live(harness, node, tmp_path, largest={0: (1, most, 64), 1: (1, most, 1)})[0]["workspace"]
    library = ctypes.CDLL(str(made(toolchain.build_host)))
    tensors = dict(zip(OPS["head"].inputs, map(torch.from_numpy, node.inputs), strict=True))
    tensors |= {"codes": torch.ones(most, 64, dtype=torch.int8), "scale": torch.ones(most)}
    tensors |= {name: torch.empty(most, dtype=torch.int64 if name == "top_ids" else F32) for name in record.OUTPUTS}
    pointers = {name: tensor.data_ptr() for name, tensor in tensors.items()}

    def used(rows: int, num_sms: int) -> int:
        """Bytes that a run writes of a workspace far larger than it asks for."""
        workspace = torch.full((2 * room,), 0x55, dtype=torch.uint8)
        args = HeadArgs(rows=rows, rows_per_batch=rows, inner=64, vocabulary=vocabulary, top_k=1, layout=1, **pointers)
        launch = Launch(0, workspace.data_ptr(), Device(80, num_sms, SHARED_BYTES[80]), 0)
        assert library.dllmc_head(ctypes.byref(args), ctypes.byref(launch)) == 0
        return int(workspace.ne(0x55).nonzero().max()) + 1

    for num_sms in (200, 256):
        assert room / 2 < used(192, num_sms) <= room


def test_an_old_gpu_is_refused_with_its_number(harness_program: Path, tmp_path: Path) -> None:
    command = [str(toolchain.host_compiler()), f"@{toolchain.HOST_FLAGS}", f"-I{toolchain.CUDA}", "-c"]
    old = toolchain.compiled(command, Path(__file__).with_name("old_device.cpp"), ".o")
    kernels = [*kernel_objects(without=("c_api", "device")), old]
    node = linear_node()
    with running(harness_program, compile_plugins(kernels=kernels)) as harness:
        step, reason = refusal(harness, node, tmp_path, node.inputs)
    assert (step, reason) == ("attachToContext", "arch: got 75, expected 80 or newer")


def test_empty_tensors_need_no_kernel(harness: Harness, tmp_path: Path) -> None:
    node = linear_node(lead=(0, 3))
    _, outputs = live(harness, node, tmp_path)
    assert outputs[0].size == 0


def refusal(harness: Harness, node: Node, folder: Path, inputs: list[np.ndarray]) -> tuple[str, str]:
    answer, _ = harness.live(node.plugin, node.attributes, inputs, folder)
    return answer["failed"], harness.reasons.removeprefix(f"dllmc: {node.plugin} node_0: ").removesuffix("\n")


MADE = {
    "quantize": lambda: quantize_node(**transform(128, state=True), norm_weight=torch.rand(128),
                                      channel_scale=torch.rand(128), tac_matrix=torch.randn(8, 16, 16),
                                      tac_bias=torch.randn(128)),
    "int4_linear": lambda: linear_node(zero=True, bias=True, residual=F32),
    "int8_linear": lambda: linear_node(a_bits=8, w_bits=8, zero=True, bias=True, residual=F32),
    "head": head_node,
    "rotate": rotate_node,
}  # fmt: skip


@pytest.mark.parametrize("op", MADE)
def test_every_input_is_known_by_its_name_in_op_py(harness: Harness, tmp_path: Path, op: str) -> None:
    node = MADE[op]()
    names = [name for name in OPS[op].present(node.attributes) if name != "state"]
    for position, name in enumerate(names):
        inputs = list(node.inputs)
        shape = () if name in ("x", "codes", "scale", "zero", "residual") else (1, 1, *inputs[position].shape)
        inputs[position] = np.zeros(shape, inputs[position].dtype)
        step, reason = refusal(harness, node, tmp_path, inputs)
        assert step in ("getOutputShapes", "configurePlugin")
        assert reason.startswith(f"{name}: got {inputs[position].ndim} axes, expected"), (name, reason)


@pytest.mark.parametrize(
    ("op", "position", "shape", "reason"),
    [
        ("quantize", 1, (64,), "norm_weight: got 64 at axis 0, expected 128"),
        ("quantize", 3, (4, 16, 16), "tac_matrix: got 4 at axis 0, expected 8"),
        ("quantize", 5, (8, 4), "left: got 4 at axis 1, expected 8"),
        ("quantize", 7, (5,), "state: got 5 values, expected 6, one a row"),
        ("int4_linear", 0, (2, 3, 32), "codes: got 32 at axis 2, expected 64"),
        ("int4_linear", 1, (3, 2, 1), "scale: got 3 at axis 0, expected 2"),
        ("int4_linear", 1, (2, 3, 2), "scale: got 2 at axis 2, expected 1"),
        ("int4_linear", 2, (6, 1), "zero: got 1 leading axes, expected 2"),
        ("int4_linear", 4, (16, 2), "w_scale: got 2 at axis 1, expected 1"),
        ("int4_linear", 5, (8, 1), "w_sum: got 8 at axis 0, expected 16"),
        ("int4_linear", 6, (32,), "bias: got 32 at axis 0, expected 16"),
        ("int4_linear", 7, (2, 3, 8), "residual: got 8 at axis 2, expected 16"),
        ("int4_linear", 3, (16, 0), "weight: got 0 at axis 1, expected 1 to 2^31 - 1"),
        ("head", 1, (2, 3, 2), "scale: got 2 at axis 2, expected 1"),
        ("head", 4, (47,), "logit_bias: got 47 at axis 0, expected 48"),
        ("head", 5, (3,), "inv_temp: got 3 at axis 0, expected 2"),
        ("rotate", 1, (2, 16, 16), "blocks: got 2 at axis 0, expected 4"),
        ("rotate", 2, (32,), "perm: got 32 at axis 0, expected 64"),
    ],
)
def test_sizes_that_do_not_fit_are_named(
    harness: Harness, tmp_path: Path, op: str, position: int, shape: tuple[int, ...], reason: str
) -> None:
    node = MADE[op]()
    inputs = list(node.inputs)
    inputs[position] = np.zeros(shape, inputs[position].dtype)
    assert refusal(harness, node, tmp_path, inputs) == ("configurePlugin", reason)


def test_what_the_kernel_refuses_is_refused_when_the_engine_is_built(harness: Harness, tmp_path: Path) -> None:
    node = linear_node()
    inputs = [np.zeros((2, 3, 20), np.int8), node.inputs[1], np.zeros((16, 20), np.int8), node.inputs[3]]
    step, reason = refusal(harness, node, tmp_path, inputs)
    assert (step, reason) == ("configurePlugin", "inner: got 40, expected a multiple of 128 in 128..131072")


def test_missing_and_surplus_inputs_are_refused(harness: Harness, tmp_path: Path) -> None:
    node = linear_node(bias=True)
    for inputs in (node.inputs[:-1], [*node.inputs, node.inputs[-1]]):
        assert refusal(harness, node, tmp_path, inputs) == (
            "getOutputDataTypes", f"inputs: got {len(inputs)}, expected {len(node.inputs)}"
        )  # fmt: skip


def test_a_wrong_type_is_refused_at_run_time(harness: Harness, tmp_path: Path) -> None:
    node = linear_node()
    inputs = [node.inputs[0], node.inputs[1].astype(np.float16), *node.inputs[2:]]
    step, reason = refusal(harness, node, tmp_path, inputs)
    assert (step, reason) == ("onShapeChange", "scale: got type HALF, expected FLOAT")
