"""The sizes that are measured: LLaDA-8B and Dream-7B, and a small model of each kind for runs without a GPU.

Shape letters: M rows (tokens), K inner, N outputs, a x b = K the Kronecker factors.
"""

import math
from dataclasses import dataclass

ROWS = (1, 8, 32, 64, 256, 512, 1024, 2048, 8192)
CANVASES = (512, 1024)
BLOCK_ROWS = 32
BLOCK_KEYS = 512
TAC_BLOCK = 16


@dataclass(frozen=True, kw_only=True)
class Gemm:
    """One linear of a block: y [M, N] (or [M, N/2] with swiglu) from K inner codes."""

    name: str
    inner: int
    outputs: int
    swiglu: bool = False
    residual: bool = False
    bias: bool = False

    @property
    def weights(self) -> int:
        """How many weights it has."""
        return self.inner * self.outputs


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of a transformer as in the published configurations (reference: its config.json)."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    vocabulary: int
    mask_id: int
    rope_theta: float
    norm_eps: float
    qkv_bias: bool
    shifted: bool

    @property
    def qkv_outputs(self) -> int:
        """Outputs of the merged q, k and v projections."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    @property
    def attention(self) -> int:
        """Inputs of the output projection."""
        return self.heads * self.head_dim

    @property
    def gemms(self) -> tuple[Gemm, ...]:
        """The four linears of a block, q, k and v merged, gate and up interleaved."""
        return (
            Gemm(name="qkv", inner=self.hidden, outputs=self.qkv_outputs, bias=self.qkv_bias),
            Gemm(name="o", inner=self.attention, outputs=self.hidden, residual=True),
            Gemm(name="gate_up", inner=self.hidden, outputs=2 * self.inner, swiglu=True),
            Gemm(name="down", inner=self.inner, outputs=self.hidden, residual=True),
        )

    @property
    def block_weights(self) -> int:
        """Weights of the linears of one block."""
        return sum(gemm.weights for gemm in self.gemms)

    def flops(self, rows: int, keys: int, head_rows: int) -> int:
        """Multiplications and additions of the matrix products of one pass."""
        linear = 2 * rows * self.block_weights
        attention = 4 * rows * keys * self.attention
        return self.layers * (linear + attention) + 2 * head_rows * self.vocabulary * self.hidden

    def bytes_read(self, keys: int, bytes_per_weight: float) -> float:
        """Least bytes that a pass reads: every weight of blocks and head, and keys and values in 16 bits."""
        weights = self.layers * self.block_weights + self.vocabulary * self.hidden
        cache = self.layers * 2 * keys * self.kv_heads * self.head_dim * 2
        return weights * bytes_per_weight + cache


def kronecker(size: int) -> tuple[int, int]:
    """Factors (a, b) of a transform's size, near its root: 4096 = 64 x 64, 3584 = 56 x 64, 18944 = 128 x 148."""
    a = next(a for a in range(math.isqrt(size) // 8 * 8, 0, -8) if size % a == 0)
    return a, size // a


def gate_slices(size: int) -> int:
    """Slices of the second factor that hold 1/32 of the coordinates, rounded up: the gate of one state."""
    return -(-kronecker(size)[1] // 32)


LLADA = ModelShape(
    name="LLaDA-8B",
    layers=32,
    hidden=4096,
    heads=32,
    kv_heads=32,
    head_dim=128,
    inner=12288,
    vocabulary=126464,
    mask_id=126336,
    rope_theta=500000.0,
    norm_eps=1e-5,
    qkv_bias=False,
    shifted=False,
)
DREAM = ModelShape(
    name="Dream-7B",
    layers=28,
    hidden=3584,
    heads=28,
    kv_heads=4,
    head_dim=128,
    inner=18944,
    vocabulary=152064,
    mask_id=151666,
    rope_theta=1000000.0,
    norm_eps=1e-6,
    qkv_bias=True,
    shifted=True,
)
TINY_LLADA = ModelShape(
    name="tiny-llada",
    layers=2,
    hidden=128,
    heads=4,
    kv_heads=4,
    head_dim=32,
    inner=256,
    vocabulary=96,
    mask_id=90,
    rope_theta=10000.0,
    norm_eps=1e-5,
    qkv_bias=False,
    shifted=False,
)
TINY_DREAM = ModelShape(
    name="tiny-dream",
    layers=2,
    hidden=128,
    heads=4,
    kv_heads=2,
    head_dim=32,
    inner=384,
    vocabulary=112,
    mask_id=100,
    rope_theta=10000.0,
    norm_eps=1e-6,
    qkv_bias=True,
    shifted=True,
)
MODELS = (LLADA, DREAM)
TINY_MODELS = (TINY_LLADA, TINY_DREAM)
