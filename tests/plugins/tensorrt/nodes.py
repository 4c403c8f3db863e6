"""Nodes for the tests: attributes and inputs as TensorRT gets them, and what the references make of them."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from plugins import OPS
from plugins.int4 import pack_codes
from plugins.layout import to_layout


@dataclass(frozen=True)
class Node:
    """One node of an op; `inputs` are the arrays that a plugin reads, `expected` the reference's outputs, packed."""

    op: str
    attributes: dict[str, int | float]
    inputs: list[np.ndarray]
    expected: list[np.ndarray]

    @property
    def plugin(self) -> str:
        return str(OPS[self.op].onnx_type)


def node(op: str, given: dict[str, Any], *, y_type: torch.dtype | None = None) -> Node:
    """The node of a call of the op's reference, whose arguments are unpacked and in the canonical layout."""
    declared = OPS[op]
    defaults = {name: p.default for name, p in declared.signature.parameters.items()}
    arguments = {**defaults, **dict.fromkeys(n for n in declared.inputs if n not in given), **given}
    wide = {name: given[name].float() for name in ("x", "residual") if given.get(name) is not None}
    expected = declared.reference(**given | wide)
    attributes = declared.attributes(arguments)
    stored = {name: arguments[name] for name in declared.present(attributes)}
    if "weight" in stored:
        attributes["layout"] = 1
        weight = pack_codes(stored["weight"], int(attributes.get("w_bits", 8)))
        stored["weight"] = to_layout(weight, 1)
    if "codes" in stored:
        stored["codes"] = pack_codes(stored["codes"], int(attributes.get("a_bits", 8)))
    outputs = list(expected) if isinstance(expected, tuple) else [expected]
    outputs = outputs[: len(declared.outputs(attributes))]
    if op == "quantize":
        outputs[0] = pack_codes(outputs[0], int(attributes["bits"]))
    if y_type:
        outputs[0] = outputs[0].to(y_type)
    return Node(op, attributes, [t.numpy() for t in stored.values()], [t.numpy() for t in outputs])


def codes(*shape: int, bits: int) -> Tensor:
    limit = 2 ** (bits - 1) - 1
    return torch.randint(-limit, limit + 1, shape, dtype=torch.int8)


def quantize_node(
    lead: tuple[int, ...] = (2, 3), inner: int = 128, dtype: torch.dtype = torch.float32, **more: Any
) -> Node:
    return node("quantize", {"x": torch.randn(*lead, inner).to(dtype), **more})


def linear_node(
    lead: tuple[int, ...] = (2, 3),
    inner: int = 128,
    outputs: int = 16,
    *,
    a_bits: int = 4,
    w_bits: int = 4,
    a_group: int = 0,
    w_group: int = 0,
    zero: bool = False,
    bias: bool = False,
    residual: torch.dtype | None = None,
    swiglu: bool = False,
) -> Node:
    a_groups, w_groups = inner // a_group if a_group else 1, inner // w_group if w_group else 1
    groups = max(a_groups, w_groups)
    weight = codes(outputs, inner, bits=w_bits)
    given: dict[str, Any] = {
        "codes": codes(*lead, inner, bits=a_bits),
        "scale": torch.rand(*lead, a_groups) + 0.5,
        "zero": torch.randint(-7, 8, (*lead, a_groups), dtype=torch.int32) if zero else None,
        "weight": weight,
        "w_scale": torch.rand(outputs, w_groups) * 0.01,
    }
    if zero:
        given["w_sum"] = torch.unflatten(weight.int(), -1, (groups, -1)).sum(-1, dtype=torch.int32)
    if bias:
        given["bias"] = torch.randn(outputs)
    if residual:
        given["residual"] = torch.randn(*lead, outputs).to(residual)
    numbers = {"a_bits": a_bits, "w_bits": w_bits, "a_group": a_group, "w_group": w_group, "swiglu": swiglu}
    name = "int4_linear" if w_bits <= 4 else "int8_linear"
    return node(name, {**given, **numbers}, y_type=residual or torch.float16)


def head_node(batch: int = 2, rows: int = 3, inner: int = 64, vocabulary: int = 48, top_k: int = 4) -> Node:
    given = {
        "codes": codes(batch, rows, inner, bits=8),
        "scale": torch.rand(batch, rows, 1) * 0.01,
        "weight": codes(vocabulary, inner, bits=8),
        "w_scale": torch.rand(vocabulary, 1) * 0.01,
        "logit_bias": torch.randn(vocabulary),
        "inv_temp": torch.rand(batch) + 0.5,
    }
    return node("head", {**given, "top_k": top_k})


def rotate_node(
    lead: tuple[int, ...] = (2, 3), inner: int = 64, block: int = 16, dtype: torch.dtype = torch.float16
) -> Node:
    given = {
        "x": torch.randn(*lead, inner).to(dtype),
        "blocks": torch.randn(inner // block, block, block),
        "perm": torch.randperm(inner),
    }
    return node("rotate", given, y_type=dtype)


# Op -> a plain node of it.
NODES = {
    "quantize": quantize_node,
    "int4_linear": linear_node,
    "int8_linear": lambda: linear_node(a_bits=8, w_bits=8),
    "head": head_node,
    "rotate": rotate_node,
}
