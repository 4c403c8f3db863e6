"""Everything that a quantiser does to a float activation before its grid; in torch a step of its own, for simulation.

    RMSNorm          x / sqrt(mean(x^2) + eps) * norm_weight
    channel scale    x * channel_scale
    TAC              x[:, b] M_b^T + d_b for each block b of g channels                        (arXiv 2606.04945)
    transform        X [a, b] -> left^T X right, that is x -> x (left kron right), x a row vector
    state gate       masked and unmasked slices stand last along gate_axis of X; each state zeroes the other's slice

Sums (mean, TAC, transform) run in float64 and are rounded to float32 once, so that their order hardly ever shows.
Shape letters: M rows, K inner, a x b = K the Kronecker factors, g channels a TAC block.
"""

from collections.abc import Mapping

import onnx_ir as ir
import torch
from torch import Tensor

from plugins.body import DOUBLE, FLOAT, INT32, INT64, Body
from plugins.op import Attributes, Op, check_together, float32


def _normalise(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    mean = x.double().square().mean(dim=-1, keepdim=True)
    return x / (mean + float32(eps)).sqrt().float() * weight


def _compensate(x: Tensor, matrix: Tensor, bias: Tensor) -> Tensor:
    blocks = torch.unflatten(x.double(), -1, (-1, matrix.shape[-1]))
    return torch.einsum("...bi,boi->...bo", blocks, matrix.double()).flatten(-2).float() + bias


def _gate(x: Tensor, state: Tensor, axis: int, size: int) -> Tensor:
    """Zero the other state's slice of x [..., a, b]; state 1 is masked."""
    if axis not in (0, 1):
        raise ValueError(f"gate_axis names a Kronecker factor; got {axis}, expected 0 or 1")
    length = x.shape[axis - 2]
    index = torch.arange(length, device=x.device).unsqueeze(1 - axis)
    unmasked_slice = index >= length - size
    masked_slice = (index >= length - 2 * size) & ~unmasked_slice
    masked = (state == 1)[..., None, None]
    return torch.where((masked & unmasked_slice) | (~masked & masked_slice), x.new_zeros(()), x)


def _transform(x: Tensor, left: Tensor, right: Tensor, state: Tensor | None, gate_axis: int, gate_size: int) -> Tensor:
    a, b = left.shape[0], right.shape[0]
    if a * b != x.shape[-1]:
        raise ValueError(f"Kronecker factors do not fit; got {a} x {b}, expected a product of {x.shape[-1]}")
    tile = (left.double().transpose(0, 1) @ torch.unflatten(x.double(), -1, (a, b)) @ right.double()).float()
    if state is not None:
        tile = _gate(tile, state.reshape(x.shape[:-1]), gate_axis, gate_size)
    return tile.flatten(-2)


def prepare(
    x: Tensor,
    norm_weight: Tensor | None = None,
    channel_scale: Tensor | None = None,
    tac_matrix: Tensor | None = None,
    tac_bias: Tensor | None = None,
    left: Tensor | None = None,
    right: Tensor | None = None,
    state: Tensor | None = None,
    eps: float = 1e-5,
    gate_axis: int = 0,
    gate_size: int = 0,
) -> Tensor:
    """Everything before the grid: float32 [..., K]; arguments as `quantize` has them."""
    check_together(tac_matrix=tac_matrix, tac_bias=tac_bias)
    check_together(left=left, right=right)
    x = x.float()
    if norm_weight is not None:
        x = _normalise(x, norm_weight, eps)
    if channel_scale is not None:
        x = x * channel_scale
    if tac_matrix is not None and tac_bias is not None:
        x = _compensate(x, tac_matrix, tac_bias)
    if left is not None and right is not None:
        return _transform(x, left, right, state, gate_axis, gate_size)
    if state is not None:
        raise ValueError("the state gate acts on the Kronecker tile; give left and right with state")
    return x


def _write_normalise(body: Body, x: ir.Value, weight: ir.Value, eps: float) -> ir.Value:
    wide = body.cast(x, DOUBLE)
    mean = body("ReduceMean", body("Mul", wide, wide), body.ints(-1), keepdims=1)
    root = body("Sqrt", body("Add", mean, body.scalar(eps, DOUBLE)))
    return body("Mul", body("Div", x, body.cast(root, FLOAT)), weight)


def _write_compensate(body: Body, x: ir.Value, matrix: ir.Value, bias: ir.Value) -> ir.Value:
    """x [M, K]; blocks as a batch: [K/g, M, g] x [K/g, g, g]."""
    shape = body.join(body.ints(0, -1), body.size(matrix, -1))
    blocks = body("Transpose", body("Reshape", body.cast(x, DOUBLE), shape), perm=[1, 0, 2])
    turned = body("Transpose", body.cast(matrix, DOUBLE), perm=[0, 2, 1])
    y = body("Transpose", body("MatMul", blocks, turned), perm=[1, 0, 2])
    return body("Add", body.cast(body("Flatten", y, axis=1), FLOAT), bias)


def _write_gate(body: Body, tile: ir.Value, state: ir.Value, axis: int, size: int) -> ir.Value:
    """tile [M, a, b]."""
    length = body("Squeeze", body.size(tile, axis + 1))
    index = body("Range", body.scalar(0, INT64), length, body.scalar(1, INT64))
    index = body("Unsqueeze", index, body.ints(1 - axis))
    unmasked_slice = body("GreaterOrEqual", index, body("Sub", length, body.scalar(size, INT64)))
    both = body("GreaterOrEqual", index, body("Sub", length, body.scalar(2 * size, INT64)))
    masked_slice = body("And", both, body("Not", unmasked_slice))
    masked = body("Reshape", body("Equal", state, body.scalar(1, INT32)), body.ints(-1, 1, 1))
    dropped = body("Or", body("And", masked, unmasked_slice), body("And", body("Not", masked), masked_slice))
    return body("Where", dropped, body.scalar(0.0), tile)


def _write_transform(body: Body, x: ir.Value, v: Mapping[str, ir.Value], attributes: Attributes) -> ir.Value:
    """x [M, K]."""
    shape = body.join(body.ints(-1), body.size(v["left"], 0), body.size(v["right"], 0))
    tile = body("Reshape", body.cast(x, DOUBLE), shape)
    left = body("Transpose", body.cast(v["left"], DOUBLE), perm=[1, 0])
    tile = body("MatMul", body("MatMul", left, tile), body.cast(v["right"], DOUBLE))
    tile = body.cast(tile, FLOAT)
    if "state" in v:
        tile = _write_gate(body, tile, v["state"], int(attributes["gate_axis"]), int(attributes["gate_size"]))
    return body("Flatten", tile, axis=1)


def write_prepare(body: Body, v: Mapping[str, ir.Value], attributes: Attributes) -> ir.Value:
    """Nodes of `prepare`; rows are flat, [M, K], where TAC or a transform acts."""
    x = v["x"]
    if "norm_weight" in v:
        x = _write_normalise(body, x, v["norm_weight"], attributes["eps"])
    if "channel_scale" in v:
        x = body("Mul", x, v["channel_scale"])
    if "tac_matrix" in v or "left" in v:
        x = body("Flatten", x, axis=-1)
    if "tac_matrix" in v:
        x = _write_compensate(body, x, v["tac_matrix"], v["tac_bias"])
    if "left" in v:
        x = _write_transform(body, x, v, attributes)
    return x


PREPARE = Op(name="prepare", reference=prepare)
