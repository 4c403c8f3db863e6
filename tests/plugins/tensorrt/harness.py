"""Talks to plugins/tensorrt/harness.cpp: requests as words, answers as JSON, reasons from its stderr."""

import json
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

FIELD_TYPES = {"float32": 1, "float64": 2, "int8": 3, "int16": 4, "int32": 5, "char": 6, "int64": 10}
DATA_TYPES = {np.dtype(np.float32): 0, np.dtype(np.float16): 1, np.dtype(np.int8): 2, np.dtype(np.int32): 3,
              np.dtype(np.int64): 8}  # fmt: skip
NUMPY_TYPES = {number: dtype for dtype, number in DATA_TYPES.items()}
_FORMATS = {"float32": "f", "float64": "d", "int8": "b", "int16": "h", "int32": "i", "int64": "q"}


@dataclass(frozen=True)
class Field:
    """A PluginField; `data` None is a null pointer."""

    name: str | None
    type: int
    length: int
    data: bytes | None


def number(name: str, value: float, type_name: str) -> Field:
    """A field of one value."""
    return Field(name, FIELD_TYPES[type_name], 1, struct.pack("<" + _FORMATS[type_name], value))


def text(name: str, value: str) -> Field:
    """A field of characters, with the zero at its end as the ONNX parser writes it."""
    data = value.encode() + b"\0"
    return Field(name, FIELD_TYPES["char"], len(data), data)


def fields_of(attributes: Mapping[str, float]) -> list[Field]:
    """A node's attributes as the ONNX parser hands them over."""
    return [
        number(name, value, "float32" if isinstance(value, float) else "int32") for name, value in attributes.items()
    ]


def state_field(state: bytes) -> Field:
    """What a plugin wrote into an engine, as the runtime phase hands it over."""
    return Field("dllmc_state", FIELD_TYPES["int8"], len(state), state)


def _hexadecimal(data: bytes | None) -> str:
    return "-" if data is None else f"x{data.hex()}"


class Harness:
    """A running harness over one library."""

    def __init__(self, process: subprocess.Popen[str], errors: IO[str]) -> None:
        assert process.stdin
        assert process.stdout
        self._process, self._errors, self._read = process, errors, 0
        self._requests, self._answers = process.stdin, process.stdout

    @property
    def reasons(self) -> str:
        """What was written to stderr since this was last asked."""
        self._errors.seek(self._read)
        found = self._errors.read()
        self._read = self._errors.tell()
        return found

    def ask(self, *words: object) -> Any:
        """The answer to a request. Fails when the process ended over it."""
        _ = self.reasons  # of what was asked before
        request = " ".join(map(str, words))
        with suppress(BrokenPipeError):
            self._requests.write(request + "\n")
            self._requests.flush()
        answer = self._answers.readline()
        assert answer, f"the harness ended with {self._process.wait()} over {request}\n{self.reasons}"
        return json.loads(answer)

    def plugins(self) -> dict[str, dict[str, int]]:
        """Names and types of the fields by plugin."""
        found: dict[str, dict[str, int]] = self.ask("list")
        return found

    def create(self, plugin: str, fields: Sequence[Field], phase: str = "build") -> str | None:
        """Null when the plugin was made, else the reason."""
        words = [
            word
            for field in fields
            for word in (
                _hexadecimal(None if field.name is None else field.name.encode()), field.type, field.length,
                _hexadecimal(field.data),
            )
        ]  # fmt: skip
        made = self.ask("create", plugin, phase, len(fields), *words)["made"]
        reasons = self.reasons
        assert made is not bool(reasons), f"made {made}, stderr {reasons!r}"
        return None if made else reasons

    def live(
        self,
        plugin: str,
        attributes: Mapping[str, float],
        inputs: Sequence[np.ndarray],
        folder: Path,
        largest: Mapping[int, tuple[int, ...]] | None = None,
    ) -> tuple[dict[str, Any], list[np.ndarray]]:
        """A whole life with these inputs: the harness's answer and the outputs. `largest` names sizes of a profile."""
        words: list[object] = ["live", plugin, len(attributes)]
        for field in fields_of(attributes):
            words += [_hexadecimal((field.name or "").encode()), field.type, field.length, _hexadecimal(field.data)]
        words.append(len(inputs))
        for i, array in enumerate(inputs):
            path = folder / f"input{i}"
            path.write_bytes(np.ascontiguousarray(array).tobytes())
            shape = array.shape
            words += [DATA_TYPES[array.dtype], array.ndim, *shape, *(largest or {}).get(i, shape), path]
        answer = self.ask(*words, folder)
        if "failed" in answer:
            return answer, []
        return answer, [
            np.fromfile(folder / str(i), NUMPY_TYPES[kind]).reshape(shape)
            for i, (kind, shape) in enumerate(zip(answer["types"], answer["shapes"], strict=True))
        ]


@contextmanager
def running(program: Path, library: Path) -> Iterator[Harness]:
    """A harness over the library, until the block ends."""
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            [str(program), str(library)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process,
    ):
        yield Harness(process, errors)
        process.communicate(timeout=60)
