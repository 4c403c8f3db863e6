"""Keys and values in plain memory that ONNX Runtime reads and writes where it lies.

The inputs past_* of a graph say which arrays there are; each has an output present_* of the same slots, given the same
memory, or present_window_* with the new slots alone, which are copied after the pass.
Shape letters: B batch, Q query rows, S slots, J key/value heads, C channels a head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.backends.backend import Ids
from pipeline.errors import InputRefused, WillNotFit

Array = npt.NDArray[Any]

PAST, PRESENT, WINDOW = "past_", "present_", "present_window_"
# Floats and scales, codes (two a byte at 4 bits), zero points.
DTYPES: dict[str, type[np.generic]] = {"tensor(float)": np.float32, "tensor(int8)": np.int8, "tensor(int32)": np.int32}


@dataclass(frozen=True)
class Part:
    """One input past_* [B, heads, S, width] and where it comes out."""

    past: str
    present: str
    dtype: type[np.generic]
    heads: int
    width: int

    @property
    def kind(self) -> str:
        """The name without the layer."""
        return self.past.rpartition("_")[0]

    def shape(self, batch: int, slots: int) -> tuple[int, int, int, int]:
        """That of the array."""
        return batch, self.heads, slots, self.width


@dataclass(frozen=True)
class Layout:
    """All parts of a graph's cache; `in_place` when what comes out are all slots."""

    parts: tuple[Part, ...]
    in_place: bool

    def empty(self, batch: int, slots: int) -> dict[str, Array]:
        """Inputs of a pass that keeps nothing, run by hand."""
        kinds = {part.kind: np.zeros(part.shape(batch, slots), part.dtype) for part in self.parts}
        return {part.past: kinds[part.kind] for part in self.parts}


def layout_of(inputs: Sequence[Any], outputs: Sequence[Any], what: str) -> Layout:
    """From the runtime's description of a graph; raises InputRefused where pasts and presents do not match."""
    pasts = [value for value in inputs if value.name.startswith(PAST)]
    if not pasts:
        raise InputRefused(f"{what} has no inputs past_*, so it keeps no keys and values; export it again")
    names = {value.name for value in outputs}
    in_place = not any(name.startswith(WINDOW) for name in names)
    parts = []
    for value in pasts:
        present = value.name.replace(PAST, PRESENT if in_place else WINDOW, 1)
        fixed = value.shape[1::2] if len(value.shape) == 4 else []
        if present not in names or value.type not in DTYPES or [type(size) for size in fixed] != [int, int]:
            raise InputRefused(
                f"{what}: {value.name} is {value.type} {value.shape} and comes out in {sorted(names - {present})}; "
                f"expected {' or '.join(DTYPES)} [batch, heads, slots, width] and {present}; export it again"
            )
        parts.append(Part(value.name, present, DTYPES[value.type], *fixed))
    return Layout(tuple(parts), in_place)


class OrtCache:
    """One array for each part, zeros at first."""

    def __init__(self, layout: Layout, batch: int, slots: int) -> None:
        self.layout, self.batch, self.slots = layout, batch, slots
        try:
            # Zeros: a slot that nobody wrote is weighed with 0, and 0 times whatever lay there may be not a number.
            self.arrays: dict[str, Array] = {
                part.past: np.zeros(part.shape(batch, slots), part.dtype) for part in layout.parts
            }
        except MemoryError:
            raise WillNotFit(f"not enough memory for the keys and values of {batch} rows of {slots} slots") from None

    @property
    def size_bytes(self) -> int:
        """Of all arrays."""
        return sum(array.nbytes for array in self.arrays.values())

    def check(self, first_row: int, rows: int, write_start: Ids, query: int) -> None:
        """Raise ValueError where a pass leaves the cache."""
        if not 0 <= first_row <= first_row + rows <= self.batch:
            raise ValueError(f"rows {first_row} to {first_row + rows} lie outside a cache of {self.batch} rows")
        low, high = int(write_start.min()), int(write_start.max()) + query
        if low < 0 or high > self.slots:
            raise ValueError(f"windows of {query} lie in slots {low} to {high}; the cache has 0 to {self.slots}")

    def place(self, windows: dict[str, Array], first_row: int, write_start: Ids) -> None:
        """Copy what a pass gave for its windows [B, J, Q, C] to its rows and slots."""
        for part in self.layout.parts:
            window, whole = windows[part.present], self.arrays[part.past]
            for row, start in enumerate(write_start.tolist(), start=first_row):
                whole[row, :, start : start + window.shape[2]] = window[row - first_row]


class Scratch:
    """Arrays by name whose memory is kept from pass to pass, of the largest size that was asked for."""

    def __init__(self) -> None:
        self.memory: dict[str, Array] = {}

    def array(self, name: str, shape: tuple[int, ...], dtype: type[np.generic]) -> Array:
        """Not cleared; raises WillNotFit."""
        size = int(np.prod(shape))
        if name not in self.memory or self.memory[name].size < size:
            self.memory.pop(name, None)
            try:
                self.memory[name] = np.empty(size, dtype)
            except MemoryError:
                raise WillNotFit(f"not enough memory for an array of {shape}") from None
        return self.memory[name][:size].reshape(shape)


def bind(to: Callable[..., None], name: str, array: Array) -> None:
    """Input or output `name` is this memory, which the caller keeps until the pass is over; `to` is of a binding."""
    to(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)


def bind_inputs(binding: Any, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Bind the inputs; the caller keeps what is returned until the pass is over."""
    held = {name: np.ascontiguousarray(array) for name, array in inputs.items()}
    for name, array in held.items():
        bind(binding.bind_input, name, array)
    return held


def bind_nothing_kept(binding: Any, layout: Layout, scratch: Scratch, batch: int, query: int) -> None:
    """Every layer has the same memory: a pass over whole canvases reads no slot that it did not write itself."""
    for part in layout.parts:
        past = scratch.array(part.kind, part.shape(batch, query), part.dtype)
        bind(binding.bind_input, part.past, past)
        present = past if layout.in_place else scratch.array(f"new {part.kind}", past.shape, part.dtype)
        bind(binding.bind_output, part.present, present)
