"""The creator's fields: those of plugins/op.py, each read by name, type, length and range, or a reason."""

import pytest

from plugins import OPS
from plugins.op import PLUGIN
from tests.plugins.tensorrt import nodes
from tests.plugins.tensorrt.harness import FIELD_TYPES, Field, Harness, fields_of, number, text
from tests.plugins.tensorrt.nodes import NODES

LINEAR = fields_of(nodes.linear_node().attributes)


def test_there_is_a_plugin_for_each_op_that_stays_a_node(harness: Harness) -> None:
    wanted = {op.onnx_type: op for op in OPS.values() if op.onnx_type and not op.inlined}
    found = harness.plugins()
    assert set(found) == set(wanted) == {made().plugin for made in NODES.values()}
    for name, fields in found.items():
        attributes = wanted[name].attribute_names
        assert tuple(fields) == attributes
        parameters = wanted[name].signature.parameters
        annotations = [parameters[a].annotation if a in parameters else int for a in attributes]
        assert list(fields.values()) == [FIELD_TYPES["float32" if a is float else "int32"] for a in annotations]


@pytest.mark.parametrize("op", NODES)
def test_a_nodes_own_fields_make_a_plugin(harness: Harness, op: str) -> None:
    node = NODES[op]()
    given = [*fields_of(node.attributes), *(text(name, value) for name, value in PLUGIN.items())]
    assert harness.create(node.plugin, given) is None
    assert harness.create(node.plugin, list(reversed(given))) is None


@pytest.mark.parametrize("op", NODES)
def test_wide_numbers_are_taken(harness: Harness, op: str) -> None:
    node = NODES[op]()
    wide = [
        number(name, value, "float64" if isinstance(value, float) else "int64")
        for name, value in node.attributes.items()
    ]
    assert harness.create(node.plugin, wide) is None


@pytest.mark.parametrize(("op", "name"), [(op, name) for op in NODES for name in OPS[op].attribute_names])
def test_each_field_is_required_once_with_its_type_and_length(harness: Harness, op: str, name: str) -> None:
    node = NODES[op]()
    given = fields_of(node.attributes)
    right = next(field for field in given if field.name == name)
    others = [field for field in given if field.name != name]
    floating = isinstance(node.attributes[name], float)
    other_type = number(name, 1, "int32") if floating else number(name, 1.0, "float32")
    expected = "FLOAT32 or FLOAT64" if floating else "INT32 or INT64"
    wrong = {
        f"{name}: got no such field, expected {'a float' if floating else 'an integer'}": [],
        f"{name}: got it twice, expected it once": [right, right],
        f"{name}: got type {'INT32' if floating else 'FLOAT32'}, expected {expected}": [other_type],
        f"{name}: got type CHAR, expected {expected}": [text(name, "4")],
        f"{name}: got type of no known number, expected {expected}": [Field(name, 77, 1, b"\0" * 8)],
        f"{name}: got 2 values, expected 1": [Field(name, right.type, 2, b"\0" * 8)],
        f"{name}: got 0 values, expected 1": [Field(name, right.type, 0, b"\0" * 8)],
        f"{name}: got -1 values, expected 1": [Field(name, right.type, -1, b"\0" * 8)],
        f"{name}: got no data, expected 1 value": [Field(name, right.type, 1, None)],
    }
    for reason, fields in wrong.items():
        assert harness.create(node.plugin, [*others, *fields]) == f"dllmc: {node.plugin} node_0: {reason}\n"


@pytest.mark.parametrize(
    ("op", "name", "value", "expected"),
    [
        ("quantize", "has_norm", 2, "0 to 1"),
        ("quantize", "bits", 1, "2 to 8"),
        ("quantize", "bits", 9, "2 to 8"),
        ("quantize", "symmetric", -1, "0 to 1"),
        ("quantize", "a_group", -128, "0 to 16777216"),
        ("quantize", "clip_lo", 0.0, "1e-30 to 1"),
        ("quantize", "clip_hi", 1.5, "1e-30 to 1"),
        ("quantize", "clip_hi", float("nan"), "1e-30 to 1"),
        ("quantize", "eps", -1.0, "0 to 1"),
        ("quantize", "eps", float("inf"), "0 to 1"),
        ("quantize", "gate_axis", 2, "0 to 1"),
        ("quantize", "gate_size", -1, "0 to 16777216"),
        ("int4_linear", "a_bits", 1, "2 to 8"),
        ("int4_linear", "w_bits", 8, "2 to 4"),
        ("int4_linear", "layout", 0, "1"),
        ("int4_linear", "swiglu", 2, "0 to 1"),
        ("int8_linear", "w_bits", 4, "5 to 8"),
        ("int8_linear", "w_group", -1, "0 to 16777216"),
        ("head", "top_k", 0, "1 to 64"),
        ("head", "top_k", 65, "1 to 64"),
        ("head", "layout", 0, "1"),
    ],
)
def test_each_number_has_a_range(harness: Harness, op: str, name: str, value: float, expected: str) -> None:
    node = NODES[op]()
    fields = fields_of({**node.attributes, name: value})
    assert (
        harness.create(node.plugin, fields)
        == f"dllmc: {node.plugin} node_0: {name}: got {value:.9g}, expected {expected}\n"
    )


@pytest.mark.parametrize("value", [2**31, -(2**31) - 1, 2**62, 2**32 + 1])
def test_wide_integers_are_not_cut(harness: Harness, value: int) -> None:
    fields = [field for field in LINEAR if field.name != "a_group"]
    reason = harness.create("DllmcInt4Linear", [*fields, number("a_group", value, "int64")])
    assert reason
    assert reason.startswith(f"dllmc: DllmcInt4Linear node_0: a_group: got {float(value):.9g}, expected 0 to")


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        (number("colour", 1, "int32"), "colour: got an unknown field, expected has_zero, has_bias, has_residual, "
         "a_bits, w_bits, a_group, w_group, swiglu, layout\n"),
        (number("x" * 300, 1, "int32"), "x" * 40 + ": got an unknown field, expected has_zero"),
        (number("", 1, "int32"), ": got an unknown field, expected has_zero"),
        (Field(None, 5, 1, b"\0" * 4), "fields: got one without a name, expected names"),
        (text("plugin_version", "2"), 'plugin_version: got "2", expected "1"'),
        (text("plugin_version", "11"), 'plugin_version: got "11", expected "1"'),
        (number("plugin_version", 1, "int32"), "plugin_version: got type INT32, expected text"),
        (text("plugin_namespace", ""), 'plugin_namespace: got "", expected "dllmc"'),
        (Field("plugin_namespace", 6, 5, None), "plugin_namespace: got no text"),
    ],
)  # fmt: skip
def test_other_fields_are_refused(harness: Harness, extra: Field, reason: str) -> None:
    assert (harness.create("DllmcInt4Linear", [*LINEAR, extra]) or "").startswith(
        f"dllmc: DllmcInt4Linear node_0: {reason}"
    )


def test_what_a_terminal_would_act_on_is_not_printed(harness: Harness) -> None:
    reason = harness.create("DllmcInt4Linear", [*LINEAR, Field("plugin_version", 6, 6, b"\x1b[31m\xff")])
    assert reason == 'dllmc: DllmcInt4Linear node_0: plugin_version: got "?[31m?", expected "1"\n'


def test_text_without_a_zero_at_its_end_is_taken(harness: Harness) -> None:
    assert harness.create("DllmcInt4Linear", [*LINEAR, Field("plugin_version", 6, 1, b"1")]) is None


@pytest.mark.parametrize(
    ("op", "changed", "reason"),
    [
        ("quantize", {"has_state": 1}, "has_state: got 1 without a transform, expected has_transform 1 with it"),
        ("int4_linear", {"swiglu": 1, "has_residual": 1},
         "swiglu: got 1 with a residual, expected has_residual 0 with it"),
        ("int4_linear", {"a_group": 128, "w_group": 64}, "w_group: got 64 with a_group 128, expected 0 or the same"),
        ("int8_linear", {"a_bits": 4}, "a_bits: got 4 with w_bits 8, expected 5 to 8"),
    ],
)  # fmt: skip
def test_attributes_may_not_contradict_each_other(
    harness: Harness, op: str, changed: dict[str, int], reason: str
) -> None:
    node = NODES[op]()
    fields = fields_of({**node.attributes, **changed})
    assert harness.create(node.plugin, fields) == f"dllmc: {node.plugin} node_0: {reason}\n"
