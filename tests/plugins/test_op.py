"""What one declaration gives: torch schema, checked registration, ONNX schema and names of variants."""

from pathlib import Path
from typing import Any

import pytest
import torch

import plugins
from plugins import OPS
from plugins.op import Op, float32


def example(name: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    codes = torch.randint(-7, 8, (2, 3, 16), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    scale, weight, w_scale = torch.ones(2, 3, 1), torch.ones(6, 16, dtype=torch.int8), torch.ones(6, 1)
    x, ones = torch.linspace(-1, 1, 96).reshape(2, 3, 16), torch.ones(2)
    table: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
        "quantize": ((x, torch.ones(16)), {"bits": 8, "symmetric": False}),
        "int4_linear": ((codes, scale, None, weight, w_scale), {"swiglu": True}),
        "int8_linear": ((codes, scale, None, weight, w_scale), {}),
        "head": ((codes, scale, weight, w_scale, torch.zeros(6), ones, 2), {}),
        "record": ((x, torch.zeros(16), ones, 2), {}),
        "guide": ((x, ones, torch.ones(1)), {}),
        "log_probability": ((x, torch.zeros(16), ones, torch.zeros(2, 3, dtype=torch.int64)), {}),
        "rotate": ((x, torch.eye(4).repeat(4, 1, 1), torch.arange(16)), {}),
        "cache_update": ((x.reshape(2, 1, 12, 4), x.reshape(2, 1, 12, 4)[:, :, :3], torch.tensor([0, 9])), {}),
        "attend": ((x.reshape(2, 2, 6, 4), x.reshape(2, 1, 12, 4), x.reshape(2, 1, 12, 4), torch.tensor([5, 12])), {}),
        "fake_quant": ((x, 4), {}),
        "prepare": ((x, torch.ones(16)), {"left": torch.eye(2), "right": torch.eye(8)}),
        "pack": ((codes,), {}),
        "dequantize_rows": ((codes, scale, None), {"bits": 4}),
        "dequantize": ((weight, w_scale, 4), {}),
    }
    return table[name]


@pytest.mark.parametrize("name", OPS)
def test_registration_is_sound(name: str) -> None:
    """Schema, fake implementation with symbolic shapes, no aliasing: torch's own checks."""
    args, kwargs = example(name)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    result = torch.library.opcheck(OPS[name].overload, args, kwargs, test_utils=checks)
    assert set(result.values()) == {"SUCCESS"}


def test_torch_schemas() -> None:
    schema = str(OPS["quantize"].overload._schema)
    assert schema.startswith("dllmc::quantize(Tensor x, Tensor? norm_weight=None, Tensor? channel_scale=None, ")
    assert schema.endswith("SymInt gate_axis=0, SymInt gate_size=0) -> (Tensor, Tensor, Tensor)")


def test_arguments_by_name_in_the_order_of_the_call() -> None:
    op = OPS["fake_quant"]
    given = op.arguments("x", clip_hi=0.5, bits=4)
    assert list(given) == list(op.signature.parameters)
    assert (given["x"], given["bits"], given["symmetric"], given["clip_hi"]) == ("x", 4, True, 0.5)
    assert op.arguments(*given.values()) == given
    with pytest.raises(TypeError, match="bits"):
        op.arguments("x")


def test_attributes_and_inputs_of_a_node() -> None:
    op = OPS["int4_linear"]
    call = dict.fromkeys(op.signature.parameters, 0) | {"bias": None, "residual": torch.ones(1), "swiglu": False}
    call |= {"zero": None, "w_sum": None}
    attributes = op.attributes(call)
    names = ["has_zero", "has_bias", "has_residual", "a_bits", "w_bits", "a_group", "w_group", "swiglu", "layout"]
    assert list(attributes) == names
    assert op.present(attributes) == ("codes", "scale", "weight", "w_scale", "residual")
    assert op.variant(attributes) == "residual,a_bits=0,w_bits=0,a_group=0,w_group=0,swiglu=0,layout=0"
    with pytest.raises(ValueError, match="come together; got no w_sum"):
        op.attributes({**call, "zero": torch.zeros(1)})


def test_float_attributes_are_those_the_file_keeps() -> None:
    assert float32(1e-6) != 1e-6 and float32(float32(1e-6)) == float32(1e-6)
    op = OPS["quantize"]
    call = {name: parameter.default for name, parameter in op.signature.parameters.items()}
    assert op.attributes({**call, "eps": 1e-6})["eps"] == float32(1e-6)
    assert type(op.attributes({**call, "clip_hi": 1})["clip_hi"]) is float


def test_every_op_file_is_in_the_table() -> None:
    folder = Path(plugins.__file__).parent
    declaring = {path.stem for path in folder.glob("*.py") if "= Op(" in path.read_text()}
    assert declaring == set(OPS)
    assert all(isinstance(op, Op) and op.name == name for name, op in OPS.items())


def test_one_translation_per_onnx_op() -> None:
    assert set(plugins.translation_table()) == {op.overload for op in OPS.values() if op.onnx_type}
    assert [name for name, op in OPS.items() if not op.onnx_type] == ["fake_quant", "prepare"]
