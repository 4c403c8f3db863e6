"""Linear layer on integer codes, shared by the 4-bit and the 8-bit op.

    acc_g = sum over k in group g of codes[m, k] * weight[n, k]                      int32, exact
    y = scale[m] * sum_g (w_scale[n, g] * float(acc_g + zero[m] * w_sum[n, g]))      activations scaled per row
    y = sum_g scale[m, g] * (w_scale[n, g] * float(acc_g + zero[m, g] * w_sum[n, g]))    scaled per group

in float32, groups ascending, every product and sum rounded by itself (no fused multiply-add), then bias, then
SwiGLU over row pairs (2i gate, 2i+1 up; excludes residual), then residual.
Shape letters: M rows, N outputs, K inner, G groups.
"""

from collections.abc import Mapping

import onnx_ir as ir
import torch
from torch import Tensor

from plugins.body import DOUBLE, FLOAT, Body
from plugins.int4 import codes_per_byte
from plugins.integer_matmul import integer_matmul, write_matmul, write_operands
from plugins.layout import from_layout, write_canonical
from plugins.op import Attributes, check_together

LINEAR_FLAGS = {"has_zero": ("zero", "w_sum"), "has_bias": ("bias",), "has_residual": ("residual",)}


# Largest K of an int32 sum, by whether weights are of 8 bits: sum and zero * w_sum, each as large, stay below 2^31.
_MAX_SUM = {False: 1 << 17, True: 1 << 16}


def _group_size(inner: int, a_group: int, w_group: int, w_bits: int) -> int:
    if a_group and w_group and a_group != w_group:
        raise ValueError(f"groups differ; got a_group {a_group} and w_group {w_group}, expected one size or 0")
    size = a_group or w_group or inner
    if inner % size:
        raise ValueError(f"group size does not divide K; got {size} and K {inner}")
    if size > (most := _MAX_SUM[w_bits > 4]):
        raise ValueError(f"sum does not fit int32; got {size} codes of K, expected at most {most} at w_bits {w_bits}")
    return size


def _column(name: str, table: Tensor, group: int, num_groups: int) -> Tensor:
    if table.shape[-1] not in (1, num_groups):
        raise ValueError(f"{name} does not fit; got {table.shape[-1]} columns, expected 1 or {num_groups}")
    return table[..., min(group, table.shape[-1] - 1)]


def _swiglu(y: Tensor) -> Tensor:
    pairs = torch.unflatten(y, -1, (-1, 2))
    gate, up = pairs[..., 0], pairs[..., 1]
    # exp differs by an ulp between libraries; in float64 that ulp disappears when silu is rounded to float32.
    wide = gate.double()
    return (wide / (1 + torch.exp(-wide))).float() * up


def integer_linear(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    weight: Tensor,
    w_scale: Tensor,
    w_sum: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    a_bits: int,
    w_bits: int,
    a_group: int,
    w_group: int,
    swiglu: bool,
    layout: int,
) -> Tensor:
    """The formula above, float32 [..., N] or [..., N/2] with swiglu.

    Raises ValueError for sizes that do not fit, swiglu with a residual, or an unknown layout.
    """
    weight = from_layout(weight, layout, codes_per_byte(w_bits))
    if swiglu and residual is not None:
        raise ValueError("swiglu halves the outputs and takes no residual")
    check_together(zero=zero, w_sum=w_sum)
    size = _group_size(weight.shape[-1], a_group, w_group, w_bits)
    num_groups = weight.shape[-1] // size
    if w_sum is not None and w_sum.shape[-1] != num_groups:
        raise ValueError(f"w_sum holds a sum a group; got {w_sum.shape[-1]} columns, expected {num_groups}")
    y: Tensor | None = None
    for group in range(num_groups):
        part = slice(group * size, (group + 1) * size)
        acc = integer_matmul(codes[..., part], weight[:, part], a_bits, w_bits)
        if zero is not None and w_sum is not None:
            shift = _column("zero", zero, group, num_groups)[..., None] * _column("w_sum", w_sum, group, num_groups)
            acc = acc + shift
        term = acc.float() * _column("w_scale", w_scale, group, num_groups)
        term = term * _column("scale", scale, group, num_groups)[..., None] if a_group else term
        y = term if y is None else y + term
    assert y is not None
    y = y if a_group else y * scale
    y = y if bias is None else y + bias
    y = _swiglu(y) if swiglu else y
    return y if residual is None else y + residual


def _write_rows(body: Body, v: Mapping[str, ir.Value], a_bits: int, w_bits: int) -> ir.Value:
    acc = write_matmul(body, v["codes"], v["weight"], a_bits, w_bits)
    if "zero" in v:
        w_sum = body("Squeeze", v["w_sum"], body.ints(1))
        acc = body("Add", acc, body("Mul", v["zero"], w_sum))
    y = body("Mul", body.cast(acc, FLOAT), body("Squeeze", v["w_scale"], body.ints(1)))
    return body("Mul", y, v["scale"])


def _write_groups(body: Body, v: Mapping[str, ir.Value], attributes: Attributes) -> ir.Value:
    """Groups as a batch: [G, M, K/G] x [G, K/G, N], summed over G."""
    size = int(attributes["a_group"] or attributes["w_group"])

    def by_row(table: ir.Value) -> ir.Value:  # [..., G] -> [G, M, 1]
        return body("Unsqueeze", body("Transpose", body("Flatten", table, axis=-1), perm=[1, 0]), body.ints(2))

    def by_output(table: ir.Value) -> ir.Value:  # [N, G] -> [G, 1, N]
        return body("Unsqueeze", body("Transpose", table, perm=[1, 0]), body.ints(1))

    bits = int(attributes["a_bits"]), int(attributes["w_bits"])
    left, right, zeros = write_operands(body, v["codes"], v["weight"], *bits)
    rows = body("Reshape", body("Flatten", left, axis=-1), body.ints(0, -1, size))
    columns = body("Reshape", right, body.ints(0, -1, size))
    rows, columns = body("Transpose", rows, perm=[1, 0, 2]), body("Transpose", columns, perm=[1, 2, 0])
    acc = body("MatMulInteger", rows, columns, *zeros)
    if "zero" in v:
        acc = body("Add", acc, body("Mul", by_row(v["zero"]), by_output(v["w_sum"])))
    terms = body("Mul", body.cast(acc, FLOAT), by_output(v["w_scale"]))
    if attributes["a_group"]:
        terms = body("Mul", terms, by_row(v["scale"]))
    # ORT reduces a leading axis by adding row after row, so groups are summed in ascending order.
    y = body("ReduceSum", terms, body.ints(0), keepdims=0)
    if not attributes["a_group"]:
        y = body("Mul", y, body("Flatten", v["scale"], axis=-1))
    return body("Reshape", y, body.join(body.lead(v["scale"]), body.ints(-1)))


def _write_swiglu(body: Body, y: ir.Value) -> ir.Value:
    pairs = body("Reshape", y, body.join(body.lead(y), body.ints(-1, 2)))
    gate, up = (body("Gather", pairs, body.scalar(i, dtype=ir.DataType.INT64), axis=-1) for i in (0, 1))
    wide = body.cast(gate, DOUBLE)
    divisor = body("Add", body("Exp", body("Neg", wide)), body.scalar(1.0, DOUBLE))
    return body("Mul", body.cast(body("Div", wide, divisor), FLOAT), up)


def write_linear(body: Body, v: Mapping[str, ir.Value], attributes: Attributes) -> list[ir.Value]:
    """Nodes of `integer_linear`."""
    w_bits = int(attributes["w_bits"])
    v = {**v, "weight": write_canonical(body, v["weight"], int(attributes["layout"]), codes_per_byte(w_bits))}
    if attributes["a_group"] or attributes["w_group"]:
        y = _write_groups(body, v, attributes)
    else:
        y = _write_rows(body, v, int(attributes["a_bits"]), w_bits)
    if "bias" in v:
        y = body("Add", y, v["bias"])
    if attributes["swiglu"]:
        y = _write_swiglu(body, y)
    if "residual" in v:
        y = body("Add", y, v["residual"])
    return [y]
