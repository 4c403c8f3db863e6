"""The strict wire reader against protobuf's own, and against noise."""

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.backends.wire import BYTES, VARINT, WireError, read_fields, read_varint


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


@given(st.integers(0, 2**64 - 1), st.binary(max_size=3))
def test_varints_round_trip(value, rest):
    data = varint(value) + rest
    assert read_varint(memoryview(data), 0, len(data), 10) == (value, len(data) - len(rest))


@given(st.text(max_size=20), st.lists(st.integers(0, 2**62), max_size=5), st.floats(width=32, allow_nan=False))
def test_fields_are_those_protobuf_wrote(name, ints, number):
    data = onnx.AttributeProto(name=name, ints=ints, f=number, i=7, s=b"x").SerializeToString()
    fields = list(read_fields(memoryview(data), (0, len(data))))
    assert [data[slice(*f.span)].decode() for f in fields if f.number == 1] == [name]
    assert [f.value for f in fields if f.number == 8] == ints
    assert [(f.value, f.kind) for f in fields if f.number == 3] == [(7, VARINT)]
    assert [f.kind for f in fields if f.number == 4] == [BYTES]


@given(st.binary(max_size=200))
def test_noise_is_read_or_refused_inside_its_span(data):
    try:
        fields = list(read_fields(memoryview(data), (0, len(data))))
    except WireError:
        return
    assert all(0 < f.span[0] <= f.span[1] <= len(data) for f in fields)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"\x0b\x0c", "wire type 3"),
        (b"\x02\x01", "out of range"),
        (b"\xba\x80\x80\x80\x80\x00\x00", "more than 5 bytes"),
        (b"\x3a\x05abc", "longer than what is left"),
        (b"\x3a\xff\xff\xff\xff\x0f", "longer than what is left"),
        (b"\x08\xff", "cut off"),
        (b"\x09\x00\x00", "longer than what is left"),
    ],
)
def test_malformed_messages_are_refused(data, why):
    with pytest.raises(WireError, match=why):
        list(read_fields(memoryview(data), (0, len(data))))
