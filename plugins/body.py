"""Writes the standard ONNX nodes that say what a custom op means; the branches of a body are plain Python."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

INT8 = ir.DataType.INT8
UINT8 = ir.DataType.UINT8
INT16 = ir.DataType.INT16
INT32 = ir.DataType.INT32
INT64 = ir.DataType.INT64
INT4 = ir.DataType.INT4
FLOAT = ir.DataType.FLOAT
DOUBLE = ir.DataType.DOUBLE


class Body:
    """A list of standard nodes under construction, names counted from 0 behind `prefix`."""

    def __init__(self, prefix: str = "") -> None:
        self._tape = Tape()
        self._prefix = prefix
        self._constants: dict[tuple[ir.DataType, tuple[float, ...], bool], ir.Value] = {}

    @property
    def nodes(self) -> Sequence[ir.Node]:
        """The nodes so far, in order of execution."""
        return self._tape.nodes

    def multi(self, op_type: str, *inputs: ir.Value | None, num_outputs: int, **attributes: Any) -> Sequence[ir.Value]:
        """Add a node with several outputs; an input that is None is left out."""
        name = f"{self._prefix}{op_type}_{len(self.nodes)}"
        values = self._tape.op_multi_out(op_type, inputs, attributes, num_outputs=num_outputs, name=name)
        for index, value in enumerate(values):
            value.name = f"{name}_out{index}" if num_outputs > 1 else f"{name}_out"
        return values

    def __call__(self, op_type: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        """Add a node with one output."""
        return self.multi(op_type, *inputs, num_outputs=1, **attributes)[0]

    def _constant(self, dtype: ir.DataType, values: tuple[float, ...], scalar: bool) -> ir.Value:
        key = (dtype, values, scalar)
        if key not in self._constants:
            array = np.array(values[0] if scalar else values, dtype=dtype.numpy())
            self._constants[key] = self("Constant", value=ir.tensor(array))
        return self._constants[key]

    def scalar(self, value: float, dtype: ir.DataType = FLOAT) -> ir.Value:
        """A constant of no dimensions."""
        return self._constant(dtype, (value,), scalar=True)

    def ints(self, *values: int) -> ir.Value:
        """A constant int64 vector: a shape or axes."""
        return self._constant(INT64, values, scalar=False)

    def cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """Convert to `dtype`."""
        return self("Cast", value, to=int(dtype))

    def size(self, value: ir.Value, axis: int) -> ir.Value:
        """Length of one axis, int64 [1]."""
        end = {} if axis == -1 else {"end": axis + 1}
        return self("Shape", value, start=axis, **end)

    def join(self, *parts: ir.Value) -> ir.Value:
        """Concatenate shape vectors."""
        return self("Concat", *parts, axis=0)

    def lead(self, value: ir.Value) -> ir.Value:
        """Shape without the last axis, int64 [rank - 1]."""
        return self("Shape", value, end=-1)
