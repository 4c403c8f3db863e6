"""Both caches: what was written is read in the next generation, bit by bit, and nothing stays."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pipeline.calibration.cache import Cache, Disk, Ram

CACHES: dict[str, Callable[[Path], Cache]] = {"ram": lambda _: Ram(), "disk": lambda folder: Disk(folder / "cache")}


@pytest.fixture(params=CACHES)
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> Cache:
    return CACHES[request.param](tmp_path)


def test_generations_follow_each_other(cache: Cache, tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    kept = None
    for _ in range(3):
        tensors = [torch.randn(2, 3 + number, 4, generator=draw).transpose(0, 1) for number in range(3)]
        for number, x in enumerate(tensors):
            cache.write(number, x)
        if kept is not None:
            assert torch.equal(cache.read(1), kept)  # the present one is still needed
        cache.advance()
        for number in (2, 0, 1, 1):
            assert torch.equal(cache.read(number), tensors[number])
        kept = cache.read(1)
        assert len(list(tmp_path.rglob("*.safetensors"))) in (0, 3)
    cache.close()
    assert kept is not None and torch.equal(kept, tensors[1])  # a tensor outlives its file
    assert list(tmp_path.iterdir()) == []


def test_every_float_survives_the_disk(tmp_path: Path) -> None:
    values = torch.tensor([0.0, -0.0, 1e-45, 3.4e38, float("inf"), float("nan")]).view(1, 1, 6)
    cache = Disk(tmp_path / "cache")
    cache.write(0, values)
    cache.advance()
    assert torch.equal(cache.read(0).view(torch.int32), values.view(torch.int32))


def test_what_a_kill_left_is_removed(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    (folder / "0-7.safetensors").write_bytes(b"x" * 9)
    Disk(folder)
    assert list(folder.iterdir()) == []
