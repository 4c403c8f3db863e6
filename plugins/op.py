"""One declaration per op: from a typed torch function follow the torch op, its fake, its ONNX node and its schema.

    parameter of the reference        torch schema      ONNX node
    x: Tensor                         Tensor x          input
    bias: Tensor | None               Tensor? bias      input when present, told by the attribute has_bias
    bits: int / eps: float / flag: bool   int / float / bool    INT / FLOAT / INT attribute

The reference is plain torch without data-dependent shapes, so it is its own fake implementation.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnxscript import values
from torch import Tensor

from plugins.body import Body

DOMAIN = "dllmc"
VERSION = 1
PLUGIN = {"plugin_version": "1", "plugin_namespace": DOMAIN}

Attributes = Mapping[str, int | float]
BodyWriter = Callable[[Body, Mapping[str, ir.Value], Attributes], Sequence[ir.Value]]

_ALL_TENSORS = [
    f"tensor({dtype.name.lower()})"
    for dtype in (ir.DataType.FLOAT, ir.DataType.INT8, ir.DataType.INT4, ir.DataType.INT32, ir.DataType.INT64)
]
_ATTRIBUTE_TYPES = {
    int: onnx.defs.OpSchema.AttrType.INT,
    float: onnx.defs.OpSchema.AttrType.FLOAT,
    str: onnx.defs.OpSchema.AttrType.STRING,
}


def float32(value: float) -> float:
    """The value an ONNX FLOAT attribute keeps; references use it too, so that both sides compute with one number."""
    return float(np.float32(value))


def check_together(**given: Tensor | None) -> None:
    """Raise ValueError when some of the named tensors are present and others are not."""
    missing = [name for name, tensor in given.items() if tensor is None]
    if missing and len(missing) < len(given):
        raise ValueError(f"{', '.join(given)} come together; got no {', '.join(missing)}")


@dataclass(frozen=True, kw_only=True)
class Op:
    """A custom op; `flags` maps a has_* attribute to the optional inputs that come and go together."""

    name: str
    reference: Callable[..., Any]
    onnx_type: str | None = None
    body: BodyWriter | None = None
    outputs: Callable[[Attributes], tuple[str, ...]] = lambda attributes: ("y",)
    narrow: Callable[[Attributes], tuple[str, ...]] = lambda attributes: ()
    """Inputs and outputs whose codes have at most 4 bits."""
    flags: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    inlined: bool = False
    """The node is replaced by its body instead of calling a function: standard ops have the whole meaning."""

    @cached_property
    def signature(self) -> inspect.Signature:
        """Parameters of the reference."""
        return inspect.signature(self.reference)

    @cached_property
    def inputs(self) -> tuple[str, ...]:
        """Names of the tensor parameters, optional ones included, in order."""
        tensors = (Tensor, Tensor | None)
        return tuple(name for name, p in self.signature.parameters.items() if p.annotation in tensors)

    @cached_property
    def attribute_names(self) -> tuple[str, ...]:
        """The has_* flags, then the numbers of the reference, in order."""
        return (*self.flags, *(name for name in self.signature.parameters if name not in self.inputs))

    @cached_property
    def overload(self) -> torch._ops.OpOverload:
        """The torch op, registered on first use."""
        custom = torch.library.custom_op(f"{DOMAIN}::{self.name}", self.reference, mutates_args=())
        custom.register_fake(self.reference)
        return cast(torch._ops.OpOverload, getattr(torch.ops.dllmc, self.name).default)

    def arguments(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Every argument of such a call by name, in order, defaults filled in. Raises TypeError where none fits."""
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return bound.arguments

    def present(self, attributes: Attributes) -> tuple[str, ...]:
        """Names of the inputs that a node with these attributes has."""
        absent = {name for flag, names in self.flags.items() if not attributes[flag] for name in names}
        return tuple(name for name in self.inputs if name not in absent)

    def attributes(self, arguments: Mapping[str, Any]) -> dict[str, int | float]:
        """Numbers of the call and its has_* flags. Raises ValueError when inputs that belong together are split."""
        found: dict[str, int | float] = {}
        for flag, names in self.flags.items():
            check_together(**{name: arguments[name] for name in names})
            found[flag] = int(arguments[names[0]] is not None)
        for name in self.attribute_names[len(self.flags) :]:
            floating = self.signature.parameters[name].annotation is float
            found[name] = float32(arguments[name]) if floating else int(arguments[name])
        return found

    def schema(self, attributes: Attributes) -> onnx.defs.OpSchema:
        """The node's signature; never registered, so nothing global changes. Types are left to the reference."""
        parameter = onnx.defs.OpSchema.FormalParameter
        inputs = [parameter(name, f"T_{name}") for name in self.present(attributes)]
        outputs = [parameter(name, f"U_{name}") for name in self.outputs(attributes)]
        return onnx.defs.OpSchema(
            str(self.onnx_type),
            DOMAIN,
            VERSION,
            inputs=inputs,
            outputs=outputs,
            type_constraints=[(p.type_str, _ALL_TENSORS, "") for p in (*inputs, *outputs)],
            attributes=[
                onnx.defs.OpSchema.Attribute(name, _ATTRIBUTE_TYPES[type(value)], "")
                for name, value in (*attributes.items(), *PLUGIN.items())
            ],
        )

    def translation(self) -> Callable[..., Any]:
        """What `torch.onnx.export` calls to write the node."""

        # The exporter sets an attribute on what it is given, which a bound method cannot carry.
        def write(*args: Any, **kwargs: Any) -> Any:
            arguments = self.arguments(*args, **kwargs)
            attributes = self.attributes(arguments)
            inputs = [arguments[name] for name in self.present(attributes)]
            node = values.Op(values.Opset(DOMAIN, VERSION), str(self.onnx_type), self.schema(attributes))
            return node(*inputs, **attributes, **PLUGIN)

        return write

    def node(self, inputs: Mapping[str, ir.Value], **numbers: float) -> ir.Node:
        """The node for edits of a model that was translated; numbers that are not given have their defaults."""
        defaults = {name: p.default for name, p in self.signature.parameters.items() if p.default is not p.empty}
        attributes = self.attributes({**dict.fromkeys(self.inputs), **defaults, **inputs, **numbers})
        return ir.Node(
            DOMAIN,
            str(self.onnx_type),
            [inputs[name] for name in self.present(attributes)],
            ir.convenience.convert_attributes({**attributes, **PLUGIN}),
            num_outputs=len(self.outputs(attributes)),
        )

    def variant(self, attributes: Attributes) -> str:
        """Name of the body for these attributes: what is switched on, then the numbers."""
        on = [flag.removeprefix("has_") for flag in self.flags if attributes[flag]]
        rest = [f"{name}={value:g}" for name, value in attributes.items() if name not in self.flags]
        return ",".join(on + rest)
