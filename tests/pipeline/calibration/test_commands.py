"""Calibration by the command line: workers and caches change no byte, text of a file is part of what was done."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from passes.methods import METHODS
from pipeline.__main__ import main
from pipeline.calibration.stream import Stream

Made = Callable[..., Path]
Out = pytest.CaptureFixture[str]
TEXT = "\n".join(f"sort {n} 3 1 2: copy abc{n}: 7+5=12;4+8=13;" for n in range(40))


@pytest.fixture
def folder(model: Made) -> Path:
    """Of one layer, shared by the session."""
    return model("llada", layers=1)


def calibrated(folder: Path, output: Path, *words: str, recipe: str = "gptq-w4a4", until: str = "quantize") -> int:
    sets = ("threads=1", "calibration.samples=40")
    settings = [word for setting in sets for word in ("--set", setting)]
    return main(["export", str(folder), "-o", str(output), "--recipe", recipe, *settings, "--until", until, *words])


def left(output: Path) -> dict[str, bytes]:
    """What the stages left in the work folder, but for their records."""
    work = output.with_name(f"{output.name}.work")
    return {path.relative_to(work).as_posix(): path.read_bytes() for path in work.rglob("*.safetensors")}


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.needs_calibration])
def test_workers_and_caches_change_no_byte(folder: Path, tmp_path: Path, method: str) -> None:
    ways = [(), ("--workers", "3", "--cache", "disk")]
    found = []
    for number, words in enumerate(ways):
        few = ("--set", "flatquant.epochs=1", "--set", "duquant.steps=8")
        assert calibrated(folder, tmp_path / str(number), *few, *words, recipe=f"{method}-w4a4") == 0
        found.append(left(tmp_path / str(number)))
    names = ("blocks.0", "constants", "ends")
    assert sorted(found[0]) == ["stats.safetensors", *(f"weights/{name}.safetensors" for name in names)]
    assert found[1] == found[0]
    assert list(tmp_path.rglob("cache*")) == []


def test_other_ways_do_nothing_again(folder: Path, tmp_path: Path, capsys: Out) -> None:
    """They are no part of a recipe."""
    assert calibrated(folder, tmp_path / "out") == 0
    assert calibrated(folder, tmp_path / "out", "--workers", "2", "--cache", "disk") == 0
    assert capsys.readouterr().err.count("done before, reused") == 2


def test_text_of_a_file_decides(folder: Path, tmp_path: Path, capsys: Out) -> None:
    path, output = tmp_path / "text.txt", tmp_path / "out"
    sets = (f"calibration.source=file:{path}", "calibration.states=clean", "calibration.length=24")
    words = [word for setting in sets for word in ("--set", setting)]
    assert calibrated(folder, output, *words, until="calibrate") == 4
    assert f"{str(path)!r}: found nothing, expected a file of text" in capsys.readouterr().err
    path.write_text(TEXT)
    assert not output.with_name("out.work").exists()
    assert calibrated(folder, output, *words, until="calibrate") == 0
    first = left(output)
    path.write_text(TEXT.replace("7+5", "8+5"))
    assert calibrated(folder, output, *words, until="calibrate") == 0
    assert "reused" not in capsys.readouterr().err
    assert left(output) != first
    path.write_text(TEXT)
    assert calibrated(folder, output, *words, until="calibrate") == 0
    assert left(output) == first
    path.write_text(TEXT[:400])
    assert calibrated(folder, output, *words, until="calibrate") == 4
    assert "gives 14 samples of calibration text" in capsys.readouterr().err


@pytest.mark.parametrize("stage", ["calibrate", "quantize"])
def test_ctrl_c_ends_the_workers_and_removes_the_cache(
    folder: Path, tmp_path: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    if stage == "quantize":
        assert calibrated(folder, output, until="calibrate") == 0
    seen: list[bool] = []

    def interrupted(*unused: object) -> None:
        seen.append(any((tmp_path / "out.work" / "cache").iterdir()))
        raise KeyboardInterrupt

    monkeypatch.setattr(Stream, "advance", interrupted)
    assert calibrated(folder, output, "--workers", "3", "--cache", "disk", until=stage) == 130
    assert seen == [True]
    assert list(tmp_path.rglob("cache")) == []
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("calibration")] == []
