"""The model to beat: bf16 weights, cuBLAS, everything between the products fused by torch's compiler.

q, k, v and gate, up are merged products, attention is torch's flash kernel, the head sees the same rows and its
reductions are fused: no slower than what a careful user would run.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu.attention import attend, place
from bench.gpu.machine import Machine
from bench.gpu.model import Model, Recorded
from bench.gpu.operands import Draws
from bench.gpu.shapes import ModelShape


def bf16_block(
    x: Tensor,
    weights: dict[str, Tensor],
    table: Tensor,
    positions: Tensor,
    keys: Tensor,
    values: Tensor,
    heads: int,
    eps: float,
) -> Tensor:
    """One pre-norm block; x [Q, D] bf16."""
    normed = F.rms_norm(x, x.shape[-1:], weights["attention_norm"], eps)
    qkv = F.linear(normed, weights["qkv"], weights.get("bias"))
    z = attend(place(qkv, table, positions, keys, values, heads), keys, values)
    x = x + F.linear(z, weights["o"])
    gate, up = F.linear(F.rms_norm(x, x.shape[-1:], weights["mlp_norm"], eps), weights["gate_up"]).chunk(2, dim=-1)
    return x + F.linear(F.silu(gate) * up, weights["down"])


def bf16_record(x: Tensor, norm: Tensor, head: Tensor, logit_bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Best id, tail and negative entropy of each row of x [R, D]; logits in bf16, reductions in float32."""
    logits = F.linear(F.rms_norm(x, x.shape[-1:], norm, eps), head).float() + logit_bias
    peak, ids = logits.max(dim=-1)
    z = logits - peak[:, None]
    others = torch.arange(z.shape[-1], device=z.device) != ids[:, None]
    weight = torch.where(others, z.exp(), 0.0)
    tail = weight.sum(dim=-1)
    return ids, tail, (weight * z).sum(dim=-1) / (1 + tail) - torch.log1p(tail)


class Bf16Model(Model):
    """Random bf16 weights, scaled so that the residual stream stays small."""

    cache_type = torch.bfloat16

    def __init__(self, shape: ModelShape, machine: Machine, draws: Draws) -> None:
        super().__init__(shape, machine)
        self.weights = {
            "embed": draws.normal(shape.vocabulary, shape.hidden, dtype=torch.bfloat16),
            "norm": torch.ones(shape.hidden, dtype=torch.bfloat16, device=machine.device),
            "head": draws.normal(shape.vocabulary, shape.hidden, dtype=torch.bfloat16).mul_(shape.hidden**-0.5),
            "blocks": [self._draw_block(draws) for _ in range(shape.layers)],
        }
        self._block = machine.compiled(bf16_block)
        self._record = machine.compiled(bf16_record)

    def _draw_block(self, draws: Draws) -> dict[str, Tensor]:
        bf16 = torch.bfloat16
        found = {}
        for gemm in self.shape.gemms:
            gain = (0.3 if gemm.residual else 1.0) * gemm.inner**-0.5
            found[gemm.name] = draws.normal(gemm.outputs, gemm.inner, dtype=bf16).mul_(gain)
            if gemm.bias:
                found["bias"] = draws.normal(gemm.outputs, dtype=bf16)
        for name in ("attention_norm", "mlp_norm"):
            found[name] = draws.between(0.5, 1.5, self.shape.hidden).to(bf16)
        return found

    def embed(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weights["embed"])

    def block(self, x: Tensor, layer: int, positions: Tensor, state: Tensor) -> Tensor:
        keys, values = self.cache[layer]
        numbers = (self.shape.heads, self.shape.norm_eps)
        found: Tensor = self._block(x, self.weights["blocks"][layer], self.table, positions, keys, values, *numbers)
        return found

    def record(self, x: Tensor) -> Recorded:
        norm, head = self.weights["norm"], self.weights["head"]
        return Recorded(*self._record(x, norm, head, self.logit_bias, self.shape.norm_eps))
