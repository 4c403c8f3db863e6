"""Where the inputs of a block lie, and then those of the next: in RAM, or in files that are mapped into memory."""

import shutil
from pathlib import Path
from typing import Protocol

from safetensors.torch import load_file, save_file
from torch import Tensor

X = "x"


class Cache(Protocol):
    """One tensor a batch, by its number; what is written becomes readable by `advance`."""

    def read(self, number: int) -> Tensor:
        """The input of the present block."""

    def write(self, number: int, x: Tensor) -> None:
        """The input of the next block."""

    def advance(self) -> None:
        """The next block becomes the present one."""

    def close(self) -> None:
        """Forget everything."""


class Ram:
    """Both generations as tensors."""

    def __init__(self) -> None:
        self._now: dict[int, Tensor] = {}
        self._next: dict[int, Tensor] = {}

    def read(self, number: int) -> Tensor:
        return self._now[number]

    def write(self, number: int, x: Tensor) -> None:
        self._next[number] = x

    def advance(self) -> None:
        self._now, self._next = self._next, {}

    def close(self) -> None:
        self._now, self._next = {}, {}


class Disk:
    """One file a batch and generation in `folder`, which is ours alone and removed in the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._generation = 0
        shutil.rmtree(folder, ignore_errors=True)  # left by a kill
        folder.mkdir()

    def read(self, number: int) -> Tensor:
        return load_file(self._path(number, self._generation))[X]

    def write(self, number: int, x: Tensor) -> None:
        save_file({X: x.contiguous()}, self._path(number, self._generation + 1))

    def advance(self) -> None:
        for path in self.folder.glob(f"{self._generation}-*"):
            path.unlink()  # a tensor that is still mapped keeps its bytes
        self._generation += 1

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, number: int, generation: int) -> Path:
        return self.folder / f"{generation}-{number}.safetensors"
