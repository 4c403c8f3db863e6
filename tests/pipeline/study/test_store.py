"""The folder of a study: cells are whole, of what was asked, and nobody else's."""

import json
from pathlib import Path

import pytest

from pipeline.errors import EnvironmentFault, UsageFault
from pipeline.study.grid import Cell
from pipeline.study.store import StudyFolder

CELL = Cell(model="models/a", method="rtn", bits="w4a4")
OUTCOME = {"fingerprint": "abc", "tasks": {"nll": 1.5}}


def test_an_outcome_comes_back_for_its_own_fingerprint(tmp_path: Path) -> None:
    with StudyFolder(tmp_path / "deep" / "out") as folder:
        folder.keep(CELL, OUTCOME)
    with StudyFolder(tmp_path / "deep" / "out") as folder:
        assert folder.outcome(CELL, "abc") == OUTCOME
        assert folder.outcome(CELL, "abd") is None


def test_models_of_one_name_have_cells_of_their_own(tmp_path: Path) -> None:
    other = Cell(model="others/a", method="rtn", bits="w4a4")
    assert other.label == CELL.label
    with StudyFolder(tmp_path) as folder:
        folder.keep(CELL, OUTCOME)
        assert folder.outcome(other, "abc") is None


@pytest.mark.parametrize("content", [b"", b'{"fingerprint": "abc"', b"[]", b"\xff"])
def test_a_damaged_cell_is_a_missing_one(tmp_path: Path, content: bytes) -> None:
    with StudyFolder(tmp_path) as folder:
        folder.keep(CELL, OUTCOME)
        (path,) = folder.cells.iterdir()
        path.write_bytes(content)
        assert folder.outcome(CELL, "abc") is None
        folder.keep(CELL, OUTCOME)
        assert json.loads(path.read_bytes()) == OUTCOME


def test_what_a_kill_left_is_removed(tmp_path: Path) -> None:
    with StudyFolder(tmp_path) as folder:
        left = folder.cells / ".a.json.17.tmp"
        left.write_bytes(b"{")
    with StudyFolder(tmp_path):
        assert not left.exists()


def test_one_study_at_a_time(tmp_path: Path) -> None:
    with StudyFolder(tmp_path), pytest.raises(UsageFault, match="another study"), StudyFolder(tmp_path):
        pass
    with StudyFolder(tmp_path):
        pass


def test_a_folder_of_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UsageFault, match="no study of ours"), StudyFolder(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(UsageFault, match="not a folder"), StudyFolder(tmp_path / "thesis.tex"):
        pass
    with pytest.raises(EnvironmentFault, match="cannot write"), StudyFolder(tmp_path / "thesis.tex" / "out"):
        pass
