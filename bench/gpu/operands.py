"""Random operands of the kernels, made on the device from a generator.

Shape letters: M rows, K inner, N outputs, G groups.
"""

import torch
from torch import Tensor

from bench.gpu.shapes import TAC_BLOCK, kronecker
from plugins.int4 import code_limit


class Draws:
    """Random tensors on one device; the same seed draws the same tensors on the same device."""

    def __init__(self, device: torch.device, seed: int) -> None:
        self.device = device
        self.generator = torch.Generator(device=device).manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal values."""
        return torch.randn(shape, generator=self.generator, device=self.device, dtype=dtype)

    def between(self, low: float, high: float, *shape: int) -> Tensor:
        """Uniform float32 values."""
        return torch.rand(shape, generator=self.generator, device=self.device) * (high - low) + low

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        """Whole numbers from low to high, both included."""
        return torch.randint(low, high + 1, shape, generator=self.generator, device=self.device, dtype=dtype)

    def packed(self, bits: int, rows: int, inner: int) -> Tensor:
        """Random codes int8 [rows, K/2] of at most 4 bits, else [rows, K]; in any layout, as their order is random."""
        limit = code_limit(bits)
        if bits > 4:
            return self.integers(-limit, limit, rows, inner, dtype=torch.int8)
        low, high = (self.integers(-limit, limit, rows, inner // 2, dtype=torch.int8) for _ in range(2))
        return (low & 15) | (high << 4)

    def activations(self, rows: int, size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Rows of unequal size with a few large channels, as the input of a quantiser has them."""
        x = self.normal(rows, size) * self.between(0.1, 4.0, rows, 1)
        x[:, :: max(size // 8, 1)] *= 8.0
        return x.to(dtype)

    def orthogonal(self, size: int) -> Tensor:
        """A random rotation [size, size]."""
        # On the CPU: a factor is small, and some devices lack the solver.
        rotation: Tensor = torch.linalg.qr(self.normal(size, size).cpu())[0]
        return rotation.contiguous().to(self.device)

    def factors(self, size: int) -> tuple[Tensor, Tensor]:
        """Kronecker factors of a transform over `size` channels."""
        a, b = kronecker(size)
        return self.orthogonal(a), self.orthogonal(b)

    def compensation(self, size: int) -> tuple[Tensor, Tensor]:
        """TAC's matrix [K/g, g, g] near the identity, and its bias [K]."""
        near = torch.eye(TAC_BLOCK, device=self.device) + 0.05 * self.normal(size // TAC_BLOCK, TAC_BLOCK, TAC_BLOCK)
        return near.contiguous(), 0.1 * self.normal(size)
