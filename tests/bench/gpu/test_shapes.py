"""The measured sizes are those of the published models."""

import pytest

from bench.gpu.shapes import DREAM, LLADA, gate_slices, kronecker


@pytest.mark.parametrize(
    ("size", "factors", "slices"),
    [(4096, (64, 64), 2), (3584, (56, 64), 2), (12288, (96, 128), 4), (18944, (128, 148), 5), (384, (16, 24), 1)],
)
def test_transforms(size: int, factors: tuple[int, int], slices: int) -> None:
    assert kronecker(size) == factors
    assert gate_slices(size) == slices
    assert (slices - 1) * factors[0] < size / 32 <= slices * factors[0]


def test_models() -> None:
    """GFLOP a token in the linears and the head, MB of 4-bit weights a block."""
    assert LLADA.flops(1, 0, 0) / 1e9 == pytest.approx(13.96, abs=0.01)
    assert DREAM.flops(1, 0, 0) / 1e9 == pytest.approx(13.05, abs=0.01)
    assert (LLADA.flops(1, 0, 1) - LLADA.flops(1, 0, 0)) / 1e9 == pytest.approx(1.04, abs=0.01)
    assert (LLADA.flops(1, 1000, 0) - LLADA.flops(1, 0, 0)) / 1e9 == pytest.approx(0.52, abs=0.01)
    assert LLADA.block_weights / 2e6 == pytest.approx(109.1, abs=0.1)
    assert DREAM.block_weights / 2e6 == pytest.approx(116.5, abs=0.1)
    # Blocks and head of LLaDA in bf16, and 0.52 MB of keys and values a slot.
    assert LLADA.bytes_read(1000, 2.0) / 1e9 == pytest.approx(13.96 + 1.036 + 0.524, abs=0.01)


def test_kernels_take_every_size() -> None:
    for shape in (LLADA, DREAM):
        for gemm in shape.gemms:
            assert gemm.inner % 128 == 0
            assert gemm.outputs % 16 == 0
        assert shape.vocabulary % 16 == 0
        assert shape.attention == shape.hidden
