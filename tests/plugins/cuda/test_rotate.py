"""Permutation and block-diagonal rotation: the kernels against the reference's sums in float64."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from plugins.cuda_library import CudaLibrary, Device, check_reason
from plugins.rotate import rotate


def inputs(rows: int, inner: int, block: int) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(rows * inner + block)
    x = torch.randn(rows, inner, generator=random)
    blocks = torch.randn(inner // block, block, block, generator=random)
    return x, blocks, torch.randperm(inner, generator=random)


def assert_near(found: Tensor, x: Tensor, blocks: Tensor, perm: Tensor, terms: int) -> None:
    """Each of `terms` float32 operations of a sum rounds by half of 2^-23 of the sum of magnitudes; then y's type."""
    magnitude = rotate(x.float().abs(), blocks.abs(), perm).double()
    expected = rotate(x, blocks, perm).double()
    last = {torch.float32: 2.0**-24, torch.float16: 2.0**-11}[found.dtype]
    bound = terms * 2.0**-24 * magnitude + expected.abs() * last * 1.01 + 2.0**-25
    assert ((found.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("path", ["tile", "naive"])
@pytest.mark.parametrize(
    ("rows", "inner", "block"),
    [
        (1, 128, 16),
        (7, 256, 64),
        (33, 256, 128),
        (65, 192, 48),
        (9, 512, 256),
        (130, 64, 4),
        (3, 64, 64),
        (5, 1024, 1024),
    ],
)
def test_near_the_reference(rows: int, inner: int, block: int, path: str, kernels: Any) -> None:
    x, blocks, perm = inputs(rows, inner, block)
    for x_type, y_type in ((torch.float32, torch.float32), (torch.float16, torch.float16)):
        found = kernels().rotate(x.to(x_type), blocks, perm, y_type=y_type, path=path)
        assert_near(found, x.to(x_type), blocks, perm, 1 if path == "naive" else block)


@pytest.mark.parametrize("num_sms", [1, 2, 132])
def test_any_number_of_blocks_walks_through_the_rows(num_sms: int, kernels: Any) -> None:
    x, blocks, perm = inputs(200, 256, 128)
    assert_near(kernels(num_sms=num_sms).rotate(x, blocks, perm), x, blocks, perm, 128)


def test_heads_of_a_real_model(kernels: Any) -> None:
    x, blocks, _ = inputs(3, 4096, 128)
    perm = torch.arange(4096)
    found = kernels().rotate(x.reshape(1, 3, 4096).half(), blocks, perm, y_type=torch.float32)
    assert_near(found[0], x.half(), blocks, perm, 128)


def test_blocks_that_the_tile_cannot_take_run_naively(kernels: Any) -> None:
    x, blocks, perm = inputs(4, 64, 2)
    assert_near(kernels().rotate(x, blocks, perm), x, blocks, perm, 1)
    with pytest.raises(ValueError, match="path: got tile, which takes blocks of 4 to 1024 channels, not 2"):
        kernels().rotate(x, blocks, perm, path="tile")


def test_a_channel_that_x_lacks_ends_the_process(host_library: Path) -> None:
    """A corrupt model must not read beside its tensors; one child a case."""
    program = f"""if True:
        import os, torch
        from plugins.cuda_library import CudaLibrary
        library = CudaLibrary({str(host_library)!r})
        for path in ("tile", "naive"):
            for channel in (-1, 64, 2**40, 5):
                child = os.fork()
                if not child:
                    perm = torch.arange(64)
                    perm[37] = channel
                    library.rotate(torch.ones(2, 64), torch.ones(4, 16, 16), perm, path=path)
                    os._exit(0)
                print(path, channel, "passed" if os.waitpid(child, 0)[1] == 0 else "ended")
    """
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    cases = [(path, channel) for path in ("tile", "naive") for channel in (-1, 64, 2**40, 5)]
    said = [f"{path} {channel} {'passed' if channel == 5 else 'ended'}" for path, channel in cases]
    assert result.stdout.splitlines() == said
    assert result.stderr.count("trap at") == result.stderr.count("rotate.cu") == 6


def test_an_old_gpu_is_refused(host_library: Path) -> None:
    x, blocks, perm = inputs(2, 64, 16)
    with pytest.raises(ValueError, match="arch: got 75, expected 80 or newer"):
        CudaLibrary(host_library, Device(75, 40, 65536)).rotate(x, blocks, perm)


def test_no_rows(kernels: Any) -> None:
    _, blocks, perm = inputs(1, 64, 16)
    assert kernels().rotate(torch.empty(0, 64), blocks, perm).shape == (0, 64)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rows": -1}, "rows: got -1"),
        ({"inner": 60}, "inner: got 60, expected a positive multiple of 8"),
        ({"block": 48}, "block: got 48, expected a divisor of 64"),
        ({"x_type": 2}, "x_type, y_type: got 2"),
        ({"y_type": -1}, "x_type, y_type: got -1"),
    ],
)
def test_refusals(fields: dict[str, Any], message: str, kernels: Any) -> None:
    good = {"rows": 1, "inner": 64, "block": 16}
    assert check_reason(kernels(), "rotate", **good) is None
    assert message in (check_reason(kernels(), "rotate", **good | fields) or "")


def test_other_paths_and_bad_pointers_are_refused(kernels: Any) -> None:
    x, blocks, perm = inputs(2, 64, 16)
    with pytest.raises(ValueError, match="path: got small, expected auto, naive or tile"):
        kernels().rotate(x, blocks, perm, path="small")
    with pytest.raises(ValueError, match="x: got an address 4 bytes off, expected a multiple of 16"):
        kernels().rotate(torch.zeros(129)[1:].reshape(2, 64), blocks, perm)
