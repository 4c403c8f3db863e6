"""The model on our kernels: eight of them a block, RoPE and attention between in torch, the head on int8.

The residual stream is float32, all else between kernels float16 or packed codes. Method `star` has a state
transform in front of every linear and TAC in front of the output projection; `rtn` has neither.
"""

from typing import Any

import torch
from torch import Tensor

from bench.gpu.attention import attend
from bench.gpu.kernels import Kernels
from bench.gpu.machine import Machine
from bench.gpu.model import Model, Recorded
from bench.gpu.operands import Draws
from bench.gpu.shapes import Gemm, ModelShape, gate_slices
from plugins.int4 import code_limit

METHODS = ("star", "rtn")
TOP_K = 8
GATE_AXIS = 1


def _rows_of_codes(ids: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    return codes[ids].float() * scale[ids]


def _uniform_spread(bits: int) -> float:
    """Standard deviation of uniform codes."""
    limit = code_limit(bits)
    return float((limit * (limit + 1) / 3) ** 0.5)


class QuantizedModel(Model):
    """Random packed weights, scaled like those of the baseline."""

    cache_type = torch.float16

    def __init__(
        self, shape: ModelShape, machine: Machine, kernels: Kernels, draws: Draws, method: str, path: str = "auto"
    ) -> None:
        super().__init__(shape, machine)
        self.kernels, self.method, self.path = kernels, method, path
        self._factors = {size: draws.factors(size) for size in {shape.hidden, shape.attention, shape.inner}}
        spread = _uniform_spread(8) * shape.hidden**0.5
        self.weights = {
            "blocks": [self._draw_block(draws) for _ in range(shape.layers)],
            "norm": torch.ones(shape.hidden, device=machine.device),
            "head": draws.packed(8, shape.vocabulary, shape.hidden),
            "head_scale": draws.between(0.5 / spread, 1.5 / spread, shape.vocabulary, 1),
        }
        self._inv_temp = torch.ones(1, device=machine.device)
        self._look_up = machine.compiled(_rows_of_codes)
        self.draw_embedding(draws, 16)

    def draw_embedding(self, draws: Draws, bits: int) -> None:
        """Replace the embedding: float16 rows, or int8 rows with one scale each."""
        shape = self.shape
        self.weights.pop("embed", None)
        self.weights.pop("embed_scale", None)
        if bits == 16:
            self.weights["embed"] = draws.normal(shape.vocabulary, shape.hidden, dtype=torch.float16)
        else:
            self.weights["embed"] = draws.packed(8, shape.vocabulary, shape.hidden)
            self.weights["embed_scale"] = draws.between(0.01, 0.02, shape.vocabulary, 1)

    def _draw_site(self, draws: Draws, size: int, norm: bool = False, tac: bool = False) -> dict[str, Any]:
        site: dict[str, Any] = {}
        if norm:
            site |= {"norm_weight": draws.between(0.5, 1.5, size), "eps": self.shape.norm_eps}
        if self.method == "star":
            # Each layer has its own copy, as a calibrated model has.
            left, right = (factor.clone() for factor in self._factors[size])
            site |= {"left": left, "right": right, "gate_axis": GATE_AXIS, "gate_size": gate_slices(size)}
            if tac:
                site["tac_matrix"], site["tac_bias"] = draws.compensation(size)
        return site

    def _draw_linear(self, draws: Draws, gemm: Gemm) -> dict[str, Any]:
        size = (0.3 if gemm.residual else 1.0) / (_uniform_spread(4) * gemm.inner**0.5)
        linear: dict[str, Any] = {
            "weight": draws.packed(4, gemm.outputs, gemm.inner),
            "w_scale": draws.between(0.5 * size, 1.5 * size, gemm.outputs, 1),
            "y_type": torch.float32 if gemm.residual else torch.float16,
            "swiglu": gemm.swiglu,
        }
        return linear | ({"bias": draws.normal(gemm.outputs)} if gemm.bias else {})

    def _draw_block(self, draws: Draws) -> dict[str, Any]:
        shape = self.shape
        sites = {
            "qkv": self._draw_site(draws, shape.hidden, norm=True),
            "o": self._draw_site(draws, shape.attention, tac=True),
            "gate_up": self._draw_site(draws, shape.hidden, norm=True),
            "down": self._draw_site(draws, shape.inner),
        }
        return {"sites": sites, "linears": {gemm.name: self._draw_linear(draws, gemm) for gemm in shape.gemms}}

    def embed(self, ids: Tensor) -> Tensor:
        if "embed_scale" in self.weights:
            found: Tensor = self._look_up(ids, self.weights["embed"], self.weights["embed_scale"])
            return found
        return self.weights["embed"][ids].float()  # type: ignore[no-any-return]

    def _linear(
        self, block: dict[str, Any], name: str, x: Tensor, state: Tensor, residual: Tensor | None = None
    ) -> Tensor:
        site = block["sites"][name]
        gated = {"state": state} if "left" in site else {}
        codes, scale, _ = self.kernels.quantize(x, path=self.path, **site, **gated)
        return self.kernels.linear(codes, scale, None, residual=residual, path=self.path, **block["linears"][name])

    def block(self, x: Tensor, layer: int, positions: Tensor, state: Tensor) -> Tensor:
        block, (keys, values) = self.weights["blocks"][layer], self.cache[layer]
        qkv = self._linear(block, "qkv", x, state)
        z = attend(self._place(qkv, self.table, positions, keys, values, self.shape.heads), keys, values)
        x = self._linear(block, "o", z.contiguous(), state, residual=x)
        h = self._linear(block, "gate_up", x, state)
        return self._linear(block, "down", h, state, residual=x)

    def record(self, x: Tensor) -> Recorded:
        codes, scale, _ = self.kernels.quantize(
            x, norm_weight=self.weights["norm"], eps=self.shape.norm_eps, bits=8, path=self.path
        )
        head = (self.weights["head"], self.weights["head_scale"], self.logit_bias, self._inv_temp, TOP_K)
        top_ids, _, tail, entropy, _ = self.kernels.head(codes[None], scale[None], *head, path=self.path)
        return Recorded(top_ids[0, :, 0], tail[0], entropy[0])
