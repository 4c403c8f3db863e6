"""Cells that cannot fit the memory are refused before any is measured; the bound is what they really keep."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from torch import Tensor, nn

from passes.graph import attributes
from pipeline.__main__ import main
from pipeline.metrics import probe
from pipeline.models.checkpoint import open_checkpoint
from pipeline.recipe import Recipe
from pipeline.study import memory, run
from pipeline.study.grid import Cell, Grid
from pipeline.study.memory import KEPT, available_bytes, cell_bytes, count_elements
from pipeline.study.subject import Sizes, Subject
from pipeline.study.tasks import TASKS

pytest.importorskip("matplotlib")
Made = Callable[..., Path]
Out = pytest.CaptureFixture[str]
SIZES = Sizes(problems=2, tokens=20, questions=1, masks=2, trajectories=1, steps=2)
GRID = Grid(methods=("rtn",), bits=("w4a4",), seeds={"w4a4": 1})
WORDS = ["--methods", "rtn", "--bits", "w4a4,w8a8", "--tokens", "60", "--questions", "1", "--masks", "2"]


def quantised(source: Path) -> Recipe:
    return GRID.recipe(Cell(model=str(source), method="rtn", bits="w4a4"))


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of the weights of every model that is loaded, in the order of loading."""
    found: list[int] = []
    load, materialise = probe.load_model, probe.materialise

    def loaded(*given: object) -> nn.Module:
        made = load(*given)
        found.append(_bytes(*made.parameters()))
        return made

    def materialised(graph: object, *given: object) -> object:
        made = materialise(graph, *given)
        found.append(_bytes(*attributes(made).values()))
        return made

    monkeypatch.setattr(probe, "load_model", loaded)
    monkeypatch.setattr(probe, "materialise", materialised)
    return found


def _bytes(*tensors: Tensor) -> int:
    return sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize(("task", "tied"), [*((task, False) for task in TASKS), ("nll", True)])
def test_the_bound_is_what_a_task_keeps(model: Made, held: list[int], task: str, tied: bool, tmp_path: Path) -> None:
    """But for scales and norms, which are more of a small model than of a large one."""
    source = model("llada", layers=1, tied=tied)
    elements = count_elements(open_checkpoint(source))
    for recipe in (None, quantised(source)):
        held.clear()
        TASKS[task](Subject(str(source), recipe, SIZES, tmp_path))
        bound = cell_bytes(elements, recipe, [task])
        assert bound <= sum(held) <= 1.1 * bound
    assert len(held) == len(KEPT[task])


def test_tasks_share_what_they_keep(model: Made) -> None:
    source = model("llada", layers=1)
    elements = count_elements(open_checkpoint(source))
    recipe = quantised(source)
    assert cell_bytes(elements, recipe, TASKS) == cell_bytes(elements, recipe, ["nll"])
    assert cell_bytes(elements, recipe, ["choice", "match"]) == cell_bytes(elements, recipe, ["choice"])


@pytest.fixture
def study(model: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`study(tasks, cells, *words)` with as much memory as `cells` are said to need; the code it ends with."""

    def never(*unused: object) -> Iterator[object]:
        raise KeyboardInterrupt  # what is not refused is not measured here either

    monkeypatch.setitem(run.ENGINES, "local", never)
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    source = model("llada", layers=1)
    elements = count_elements(open_checkpoint(source))
    recipes = {"full": None, "rtn": quantised(source)}

    def act(tasks: str, cells: dict[str, str], *words: str) -> int:
        enough = sum(cell_bytes(elements, recipes[name], each.split(",")) for name, each in cells.items())
        (tmp_path / "meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable:  {-(-enough // 1024)} kB\nBuffers: 9 kB\n")
        return main(["study", str(source), *WORDS, "--tasks", tasks, "-o", str(tmp_path / "out"), *words])

    return act


ALL = "nll,match,choice"


@pytest.mark.parametrize(
    ("tasks", "cells", "words", "said"),
    [
        (ALL, {}, [], "available; use a machine with more memory"),
        (ALL, {"rtn": ALL}, ["--jobs", "9"], "3 cells at a time need at least"),
        (ALL, {"rtn": ALL}, ["--jobs", "9"], "available; pass --jobs 1, or use"),
        (ALL, {"rtn": ALL}, ["--jobs", "2"], "available; pass --jobs 1 or --tasks match,choice, or use"),
        (ALL, {"full": ALL}, [], "a cell of this study needs at least"),
        (ALL, {"full": ALL}, [], "available; pass --tasks match,choice, or use"),
    ],
)
def test_what_will_not_fit_is_refused(
    study: Callable[..., int], tasks: str, cells: dict[str, str], words: list[str], said: str, capsys: Out
) -> None:
    assert study(tasks, cells, *words) == 3
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_what_fits_is_measured(study: Callable[..., int]) -> None:
    assert study(ALL, {"rtn": ALL}) == 130
    assert study("choice", {"full": "choice", "rtn": "choice"}, "--jobs", "2") == 130


@pytest.mark.parametrize("content", [None, "MemTotal: 1 kB\n"])
def test_a_system_that_does_not_say_refuses_nothing(
    study: Callable[..., int], content: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "other")
    if content:
        (tmp_path / "other").write_text(content)
    assert available_bytes() is None
    assert study(ALL, {}) == 130


def test_cells_that_are_there_need_no_memory(
    study: Callable[..., int], model: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Full precision was measured before, and nothing else needs it for these tasks."""
    assert study("choice", {"rtn": "choice"}) == 3
    kept = run.StudyFolder.outcome
    monkeypatch.setattr(
        run.StudyFolder,
        "outcome",
        lambda folder, cell, digest: {} if cell.method == "full" else kept(folder, cell, digest),
    )
    assert study("choice", {"rtn": "choice"}) == 130
