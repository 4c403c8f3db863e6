"""What a plugin writes into an engine: read back as it was, and any damage to it is a reason, never a crash."""

import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.plugins.tensorrt import nodes
from tests.plugins.tensorrt.harness import Field, Harness, fields_of, state_field

PLUGIN = "DllmcInt4Linear"
HEADER_BYTES, NUMBER_BYTES, CHECKSUM_BYTES = 48, 32, 8


@pytest.fixture(scope="module")
def state(harness: Harness, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    node = nodes.linear_node(bias=True)
    answer, _ = harness.live(node.plugin, node.attributes, node.inputs, tmp_path_factory.mktemp("state"))
    return bytes.fromhex(answer["state"])


def checksum(data: bytes) -> int:
    total = 14695981039346656037
    for byte in data:
        total = (total ^ byte) * 1099511628211 % 2**64
    return total


def sealed(body: bytes) -> bytes:
    """A blob with the checksum that belongs to it."""
    return body + struct.pack("<Q", checksum(body))


def test_the_state_holds_every_attribute(state: bytes) -> None:
    attributes = nodes.linear_node(bias=True).attributes
    magic, version, size, plugin, count, zero = struct.unpack_from("<8sII24sII", state)
    assert (magic, version, size, count, zero) == (b"dllmcTRT", 1, len(state), len(attributes), 0)
    assert plugin.rstrip(b"\0").decode() == PLUGIN
    entries = [struct.unpack_from("<20siq", state, HEADER_BYTES + i * NUMBER_BYTES) for i in range(count)]
    assert {name.rstrip(b"\0").decode(): value for name, _, value in entries} == attributes
    assert state == sealed(state[:-CHECKSUM_BYTES])


def test_floats_come_back_exactly(harness: Harness, tmp_path: Path) -> None:
    node = nodes.quantize_node(clip_hi=0.9, eps=1e-6, norm_weight=nodes.torch.ones(128))
    answer, _ = harness.live(node.plugin, node.attributes, node.inputs, tmp_path)
    state = bytes.fromhex(answer["state"])
    values = [struct.unpack_from("<20sid", state, HEADER_BYTES + i * NUMBER_BYTES) for i in range(len(node.attributes))]
    found = {name.rstrip(b"\0").decode(): value for name, kind, value in values if kind == 2}
    assert found == {name: value for name, value in node.attributes.items() if isinstance(value, float)}


def refused(harness: Harness, data: bytes) -> str:
    reason = harness.create(PLUGIN, [state_field(data)], phase="runtime")
    assert reason, data
    return reason.removeprefix(f"dllmc: {PLUGIN} node_0: ")


def test_a_whole_state_makes_a_plugin(harness: Harness, state: bytes) -> None:
    assert harness.create(PLUGIN, [state_field(state)], phase="runtime") is None


def test_every_damaged_byte_is_seen(harness: Harness, state: bytes) -> None:
    for i in range(len(state)):
        refused(harness, state[:i] + bytes([state[i] ^ (1 << i % 8)]) + state[i + 1 :])


def test_every_cut_and_longer_state_is_seen(harness: Harness, state: bytes) -> None:
    for size in range(len(state)):
        refused(harness, state[:size])
    assert refused(harness, state + b"\0").startswith(f"dllmc_state: got {len(state) + 1} bytes")


def test_a_sealed_state_of_something_else_is_refused(harness: Harness, state: bytes) -> None:
    body = state[:-CHECKSUM_BYTES]
    first = HEADER_BYTES
    assert refused(harness, sealed(b"X" + body[1:])).startswith("dllmc_state: got another program's data")
    assert refused(harness, sealed(body[:8] + struct.pack("<I", 2) + body[12:])) == (
        "dllmc_state: got version 2, expected 1; build the engine again\n"
    )
    assert "expected DllmcInt4Linear's" in refused(harness, sealed(body.replace(b"Int4", b"Int8", 1)))
    assert "got a wrong checksum" in refused(harness, body + b"\0" * CHECKSUM_BYTES)
    renamed = body.replace(b"a_bits", b"b_bits", 1)
    assert "b_bits: got an unknown field" in refused(harness, sealed(renamed))
    endless = body[:first] + b"x" * 20 + body[first + 20 :]
    assert "xxx: got an unknown field" in refused(harness, sealed(endless))
    nine = body[: first + 3 * NUMBER_BYTES + 24] + struct.pack("<q", 9) + body[first + 3 * NUMBER_BYTES + 32 :]
    assert refused(harness, sealed(nine)) == "a_bits: got 9, expected 2 to 8\n"
    twice = body[:first] + body[first + NUMBER_BYTES : first + 2 * NUMBER_BYTES] + body[first + NUMBER_BYTES :]
    assert "got it twice" in refused(harness, sealed(twice))


def resized(state: bytes, entries: bytes) -> bytes:
    """A sealed state with these attributes, and a header that says so."""
    size, count = HEADER_BYTES + len(entries) + CHECKSUM_BYTES, len(entries) // NUMBER_BYTES
    header = state[:12] + struct.pack("<I", size) + state[16:40] + struct.pack("<I", count) + state[44:HEADER_BYTES]
    return sealed(header + entries)


def test_a_list_of_too_few_or_too_many_attributes_is_refused(harness: Harness, state: bytes) -> None:
    entries = state[HEADER_BYTES:-CHECKSUM_BYTES]
    assert (
        refused(harness, resized(state, entries[:-NUMBER_BYTES])) == "layout: got no such field, expected an integer\n"
    )
    assert refused(harness, resized(state, b"")) == "has_zero: got no such field, expected an integer\n"
    assert refused(harness, resized(state, entries + entries[:NUMBER_BYTES])).startswith("has_zero: got it twice")
    for count in (17, 18, 100, 1000):
        assert f"got {count} attributes, expected at most 16" in refused(
            harness, resized(state, entries[:NUMBER_BYTES] * count)
        )


@pytest.mark.parametrize("count", [0, 8, 17, 2**27, 2**31, 2**32 - 1])
def test_a_wild_number_of_attributes_is_refused(harness: Harness, state: bytes, count: int) -> None:
    body = state[:-CHECKSUM_BYTES]
    assert "attributes" in refused(harness, sealed(body[:40] + struct.pack("<I", count) + body[44:]))


def test_the_runtime_phase_takes_the_state_alone(harness: Harness, state: bytes) -> None:
    field = state_field(state)
    for fields in ([], [field, field], fields_of(nodes.linear_node().attributes)):
        reason = harness.create(PLUGIN, fields, phase="runtime")
        assert reason
        assert f"dllmc_state: got {len(fields)} other fields" in reason
    for wrong in (Field("dllmc_state", 6, len(state), state), Field(None, 3, len(state), state)):
        assert harness.create(PLUGIN, [wrong], phase="runtime")
    assert harness.create(PLUGIN, [Field("dllmc_state", 3, len(state), None)], phase="runtime")
    assert harness.create(PLUGIN, [Field("dllmc_state", 3, -1, state)], phase="runtime")
    assert "unknown field" in (harness.create(PLUGIN, [field]) or "")


@settings(max_examples=300)
@given(st.data())
def test_random_damage_never_crashes(harness: Harness, state: bytes, data: st.DataObject) -> None:
    body = bytearray(state)
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(body)))
        cut = data.draw(st.integers(0, 40))
        body[start : start + cut] = data.draw(st.binary(max_size=40))
    damaged = sealed(bytes(body)) if data.draw(st.booleans()) else bytes(body)
    harness.create(PLUGIN, [state_field(damaged)], phase="runtime")


@settings(max_examples=300)
@given(st.data())
def test_random_fields_never_crash(harness: Harness, data: st.DataObject) -> None:
    names = harness.plugins()
    plugin = data.draw(st.sampled_from(sorted(names)))
    known = st.sampled_from([*names[plugin], "plugin_version", "plugin_namespace", "dllmc_state"])
    # TensorRT vouches for the length, so data holds as many values as the longest type needs.
    field = st.builds(
        lambda name, kind, length, values: Field(name, kind, length, values and values * max(length, 1)),
        st.one_of(st.none(), known, st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=50)),
        st.integers(-1, 13),
        st.one_of(st.just(1), st.integers(-2, 60)),
        st.one_of(st.none(), st.binary(min_size=8, max_size=8)),
    )
    fields = data.draw(st.lists(field, max_size=20))
    harness.create(plugin, fields, phase=data.draw(st.sampled_from(["build", "runtime"])))
