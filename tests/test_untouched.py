"""What an export never does: change the model, delete what it did not make, carry off private files, blame the disk."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline import stages
from tests.exports import export

Made = Callable[..., Path]
Out = pytest.CaptureFixture[str]


def everything(root: Path) -> dict[str, bytes | None]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes() if path.is_file() else None for path in root.rglob("*")
    }


@pytest.fixture
def folder(model: Made, tmp_path: Path) -> Path:
    """A copy of a small checkpoint."""
    return Path(shutil.copytree(model("llada", layers=1, kv_heads=4), tmp_path / "model"))


def refused(folder: Path, output: Path, code: int, words: str, capsys: Out) -> None:
    """That exports to this place, forced or not, end with this code and change nothing."""
    before = everything(folder.parent)
    for force in ((), ("--force",)):
        assert export(folder, output, "rtn-w4a4", *force) == code
        assert words in capsys.readouterr().err.splitlines()[-1]
    assert everything(folder.parent) == before


@pytest.mark.parametrize("place", ["model", "model/out", "."])
def test_the_model_folder_is_not_an_output(folder: Path, place: str, capsys: Out) -> None:
    refused(folder, folder.parent / place, 2, "where nothing is written", capsys)


def test_a_folder_with_work_in_it_is_not_replaced(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Out
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("years")
    monkeypatch.chdir(home)
    before = everything(tmp_path)
    assert export(folder, Path("."), "rtn-w4a4", "--force") == 2
    assert "no bundle of ours" in capsys.readouterr().err.splitlines()[-1]
    assert everything(tmp_path) == before


def test_a_work_folder_of_somebody_else_is_not_used(folder: Path, tmp_path: Path, capsys: Out) -> None:
    (tmp_path / "out.work").mkdir()
    (tmp_path / "out.work" / "thesis.txt").write_text("years")
    refused(folder, tmp_path / "out", 2, "not a work folder of dllmc", capsys)


@pytest.mark.parametrize("name", ["LICENSE", "README.md", "chat_template.jinja"])
def test_a_private_file_does_not_travel(folder: Path, name: str, tmp_path: Path, capsys: Out) -> None:
    """And is refused before any work."""
    (tmp_path / "id_rsa").write_text("-----BEGIN PRIVATE KEY-----")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(Path("..", "id_rsa"))
    refused(folder, tmp_path / "out", 4, f"{name} is a link to", capsys)


@pytest.mark.parametrize(("place", "code"), [("model", 4), ("out.work", 8)])
def test_a_file_that_cannot_be_read_is_named(
    folder: Path, place: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Out
) -> None:
    path = str(tmp_path / place / "x.safetensors")

    def fail(*unused: object) -> list[str]:
        raise OSError(5, os.strerror(5), path)

    monkeypatch.setitem(stages.ROAD, "calibrate", fail)
    assert export(folder, tmp_path / "out", "rtn-w4a4") == code
    error = capsys.readouterr().err.splitlines()[-1]
    assert (f"{path} cannot be read" in error) == (code == 4)
    assert ("cannot write" in error) == (code == 8)


def test_a_name_that_cannot_be_is_no_bug(folder: Path, tmp_path: Path, capsys: Out) -> None:
    assert export(Path("a" * 300), tmp_path / "out", "rtn-w4a4") == 4
    assert export(Path("~nobody_of_this_name"), tmp_path / "out", "rtn-w4a4") == 4
    assert export(folder, tmp_path / ("a" * 300), "rtn-w4a4") == 8
    assert "a bug in dllmc" not in capsys.readouterr().err
