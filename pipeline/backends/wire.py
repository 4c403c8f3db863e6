"""Reads protobuf wire format from untrusted bytes, strictly, without building anything. Standard library only.

What our reading could take differently than the C++ reader does is refused: groups, over-long varints, field 0.
"""

from collections.abc import Iterator
from typing import NamedTuple

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
MAX_SIZE = 2**31 - 1  # protobuf's own limit for one message


class WireError(ValueError):
    """The bytes are no well-formed message."""


class Field(NamedTuple):
    """One field of a message; `value` is the varint, `span` the place of the payload in the buffer."""

    number: int
    kind: int
    value: int
    span: tuple[int, int]


def read_varint(buffer: memoryview, at: int, end: int, most: int) -> tuple[int, int]:
    """The varint at `at` and the place after it; `most` is how many bytes its kind may take."""
    value = 0
    for taken in range(most):
        if at + taken >= end:
            raise WireError("a number is cut off")
        byte = buffer[at + taken]
        value |= (byte & 0x7F) << (7 * taken)
        if byte < 0x80:
            return value, at + taken + 1
    raise WireError(f"a number takes more than {most} bytes")


def read_fields(buffer: memoryview, span: tuple[int, int]) -> Iterator[Field]:
    """The fields of the message in `span`, in order; raises WireError."""
    at, end = span
    while at < end:
        tag, at = read_varint(buffer, at, end, 5)
        number, kind = tag >> 3, tag & 7
        if number == 0 or tag >= 2**32:
            raise WireError("a field number is out of range")
        value, size = 0, 0
        if kind == VARINT:
            value, at = read_varint(buffer, at, end, 10)
        elif kind == BYTES:
            size, at = read_varint(buffer, at, end, 5)
        elif kind in (FIXED32, FIXED64):
            size = 4 if kind == FIXED32 else 8
        else:
            raise WireError(f"wire type {kind} is not used by ONNX")
        if size > min(end - at, MAX_SIZE):
            raise WireError("a field is longer than what is left of its message")
        yield Field(number, kind, value, (at, at + size))
        at += size
