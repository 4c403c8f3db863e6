"""One small lowered model with all that proves it, and ways to spoil the written file."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from tokenizers import Tokenizer
from torch.fx import GraphModule

from pipeline.backends.backend import Feeds
from pipeline.backends.eager import EagerSession
from pipeline.calibration.states import States
from pipeline.folder import MODEL, MODEL_DATA, read_job
from pipeline.models.checkpoint import Checkpoint, open_checkpoint
from pipeline.quantize import Weights
from pipeline.recipe import Recipe
from pipeline.recipe_file import parse_recipe
from pipeline.runner.settings import Settings
from pipeline.validate import measurement_states, settings_of, torch_session
from pipeline.validation.feeds import sweep

Change = Callable[["np.ndarray[Any, Any]"], object]


@dataclass(frozen=True, kw_only=True)
class Lowered:
    """The work folder after lower (read only), and the same graph in torch."""

    work: Path
    checkpoint: Checkpoint
    recipe: Recipe
    tokenizer: Tokenizer
    weights: Weights
    reference: EagerSession

    @property
    def graph(self) -> GraphModule:
        assert isinstance(self.reference.graph, GraphModule)
        return self.reference.graph

    @property
    def settings(self) -> Settings:
        return settings_of(self.checkpoint, self.recipe, self.tokenizer)

    @property
    def feeds(self) -> list[Feeds]:
        return list(sweep(self.settings, 1))

    @property
    def states(self) -> States:
        return measurement_states(self.checkpoint, self.recipe, self.tokenizer)


@pytest.fixture(scope="session")
def lowered(stages_done: Path, model: Callable[..., Path]) -> Lowered:
    checkpoint = open_checkpoint(model("llada", layers=1))
    recipe = parse_recipe(read_job(stages_done.with_name("out"))["recipe"], "the recorded recipe")
    weights = Weights(stages_done / "weights")
    return Lowered(
        work=stages_done,
        checkpoint=checkpoint,
        recipe=recipe,
        tokenizer=checkpoint.tokenizer(),
        weights=weights,
        reference=torch_session(checkpoint, recipe, weights, lowered=True),
    )


@pytest.fixture
def written(lowered: Lowered, tmp_path: Path) -> Path:
    """A copy of the ONNX file that a test may spoil."""
    for name in (MODEL, MODEL_DATA):
        shutil.copy(lowered.work / name, tmp_path / name)
    return tmp_path / MODEL


def bytes_of(path: Path, name: str, dtype: type[np.generic] = np.uint8) -> "np.ndarray[Any, Any]":
    """The stored bytes of one initialiser, as a view that writes through."""
    tensors = {tensor.name: tensor for tensor in onnx.load(path, load_external_data=False).graph.initializer}
    place = {entry.key: entry.value for entry in tensors[name].external_data}
    size = np.dtype(dtype).itemsize
    data = path.with_name(MODEL_DATA)
    return np.memmap(data, dtype, "r+", int(place["offset"]), (int(place["length"]) // size,))


def spoil(path: Path, name: str, change: Change, dtype: type[np.generic] = np.uint8) -> None:
    """Apply `change`, in place, to the stored bytes of one initialiser."""
    view = bytes_of(path, name, dtype)
    change(view)
    view.flush()  # type: ignore[attr-defined]


def flip(view: "np.ndarray[Any, Any]") -> None:
    """Change a few packed bytes in the middle, and no code to -8."""
    middle = len(view) // 2
    view[middle : middle + 4] ^= 0x11


def swap(path: Path, one: str, other: str) -> None:
    """Exchange two initialisers of equal size."""
    first, second = bytes_of(path, one), bytes_of(path, other)
    first[:], second[:] = second.copy(), first.copy()
    first.flush()  # type: ignore[attr-defined]
    second.flush()  # type: ignore[attr-defined]
