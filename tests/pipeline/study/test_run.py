"""The whole study on a small random model: every task, a kill at any moment, other engines, and the same bytes."""

import errno
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.__main__ import main
from pipeline.fingerprint import model_digest
from pipeline.folder import LOCK, MODEL, MODEL_DATA, read_job
from pipeline.models.checkpoint import open_checkpoint
from pipeline.models.config import ModelConfig
from pipeline.progress import Progress
from pipeline.quantize import Weights
from pipeline.recipe import Recipe
from pipeline.recipe_file import parse_recipe
from pipeline.study import measure as measuring
from pipeline.study import run, subject
from pipeline.study.engines import ENGINES
from pipeline.study.grid import Grid, Variant
from pipeline.study.subject import Sizes
from pipeline.study.tasks import TASKS

pytest.importorskip("matplotlib")
Made = Callable[..., Path]
Out = pytest.CaptureFixture[str]

ROOT = Path(__file__).parents[3]
SIZES = ["--problems", "6", "--tokens", "60", "--questions", "2", "--masks", "2", "--trajectories", "2"]
SETS = ["--set", "calibration.samples=8", "--set", "smoothquant.alpha=0.6"]
GRID = ["--methods", "rtn,smoothquant", "--bits", "w4a4,w3a16", "--seeds", "1,w4a4=2", *SIZES, *SETS]
FILES = ("study.json", "study.md", "nll.png")


def words(source: Path, output: Path, *more: str) -> list[str]:
    """A study of one task, which needs no export."""
    return ["study", str(source), *GRID, "--tasks", "nll", "-o", str(output), *more]


@pytest.fixture(scope="module")
def source(model: Made) -> Path:
    return model("llada", layers=1)


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One uninterrupted run, in this process."""
    output = tmp_path_factory.mktemp("study") / "out"
    assert main(words(source, output)) == 0
    return output


def same(first: Path, second: Path) -> bool:
    return all((first / name).read_bytes() == (second / name).read_bytes() for name in FILES)


@pytest.fixture
def exported_before(stages_done: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An export of this model as rtn-w4a4 takes the file that was made of the same weights."""
    recipe = parse_recipe(read_job(stages_done.with_name("out"))["recipe"], "the recorded recipe")
    weights = Weights(stages_done / "weights").all()

    def write_onnx(config: ModelConfig, asked: Recipe, found: Weights, path: Path, **_: object) -> None:
        assert config == open_checkpoint(source).config
        graph_parts = {"method", "linear", "head", "embedding", "attention", "skip", "lowering"}
        assert asked.model_dump(include=graph_parts) == recipe.model_dump(include=graph_parts)
        assert found.names == weights.keys()
        assert all(torch.equal(found[name], value) for name, value in weights.items())
        for name in (MODEL, MODEL_DATA):
            shutil.copy(stages_done / name, path.with_name(name))

    monkeypatch.setattr(subject, "write_onnx", write_onnx)


@pytest.mark.usefixtures("exported_before")
def test_every_task_is_measured(source: Path, tmp_path: Path, capsys: Out) -> None:
    settings = ["--methods", "rtn", "--bits", "w4a4", *SIZES, *SETS[:2]]
    assert main(["study", str(source), *settings, "-o", str(tmp_path / "out"), "--json"]) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert events[-1] == {
        "event": "result",
        "folder": str(tmp_path / "out"),
        "table": "study.md",
        "figures": "study.json",
    }
    full, rtn = json.loads((tmp_path / "out/study.json").read_bytes())["rows"]
    assert {"nll", "match", "choice"} <= set(full["measured"])
    assert {"nll", "kl", "argmax", "match", "same_answers", "choice", "free", "forced"} <= set(rtn["measured"])
    assert rtn["linears"] == {"quantised": 4, "kept": 0}
    assert rtn["runs_in"] == "ort"
    assert rtn["measured"]["match"]["count"] == 6
    cells = [json.loads(path.read_bytes()) for path in (tmp_path / "out/cells").iterdir()]
    assert {tuple(cell["seconds"]) for cell in cells} == {tuple(sorted(["quantise", "export", *TASKS]))}


def test_the_table_has_every_cell_or_its_reason(whole: Path) -> None:
    content = json.loads((whole / "study.json").read_bytes())
    found = [(row["method"], row["bits"], row.get("seeds"), "reason" in row) for row in content["rows"]]
    assert found == [
        ("full", "float32", 1, False),
        ("rtn", "w4a4", 1, False),
        ("smoothquant", "w4a4", 2, False),
        ("rtn", "w3a16", None, True),
        ("smoothquant", "w3a16", None, True),
    ]
    assert "group" in content["rows"][3]["reason"]  # 128 does not divide this model's sizes
    assert "smoothquant cannot do w3a16" in content["rows"][4]["reason"]
    first, second = content["rows"][2]["measured"]["nll"]["seeds"]
    assert first != second
    assert str(whole.parent) not in (whole / "study.json").read_text()


def test_a_repeated_study_measures_nothing(
    whole: Path, source: Path, monkeypatch: pytest.MonkeyPatch, capsys: Out
) -> None:
    before = {name: (whole / name).read_bytes() for name in FILES}

    def never(order: object) -> dict[str, object]:
        raise AssertionError("this cell was measured before")

    monkeypatch.setattr(run, "measure", never)
    assert main(words(source, whole)) == 0
    assert "4 of 4 cells done before, reused" in capsys.readouterr().err
    assert {name: (whole / name).read_bytes() for name in FILES} == before


@pytest.mark.parametrize("change", ["tokens", "recipe", "code"])
def test_cells_of_another_study_are_measured_again(
    whole: Path, source: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = {"tokens": ["--tokens", "61"], "recipe": ["--set", "smoothquant.alpha=0.7"], "code": []}[change]
    if change == "code":
        monkeypatch.setattr(run, "measuring_code", lambda: "other")
    asked: list[str] = []

    def counted(order: measuring.Order) -> dict[str, object]:
        asked.append(order.cell.method)
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "measure", counted)
    assert main(words(source, whole, *more)) == 130
    assert asked == (["rtn"] if change == "recipe" else ["full"])  # full precision has no recipe


def test_a_format_that_cannot_be_exported_runs_in_torch(source: Path, tmp_path: Path) -> None:
    settings = ["--methods", "rtn", "--bits", "w4a4", "--tasks", "match", *SIZES, "--set", "attention.prob_bits=8"]
    assert main(["study", str(source), *settings, "-o", str(tmp_path / "out")]) == 0
    full, rtn = json.loads((tmp_path / "out/study.json").read_bytes())["rows"]
    assert (full["runs_in"], rtn["runs_in"]) == ("torch", "torch")
    assert rtn["recipe"]["attention"]["prob_bits"] == 8
    assert rtn["measured"]["same_tokens"]["count"] == 6


def test_variants_are_measured_each_with_its_own_settings(source: Path, tmp_path: Path) -> None:
    variants = {
        "whole": Variant(recipe="rtn-w4a4"),
        "wide": Variant(recipe="rtn-w4a4", sets=("head.bits=16", "attention.v_bits=4")),
    }
    request = run.Request(
        models=(str(source),), grid=Grid(variants=variants, seeds={}), tasks=("nll",), sizes=Sizes(tokens=60)
    )
    content = run.study(request, tmp_path / "out", report=Progress())
    full, whole, wide = content["rows"]
    assert (whole["variant"], wide["variant"]) == ("whole", "wide")
    assert (wide["recipe"]["head"]["bits"], wide["recipe"]["attention"]["v_bits"]) == (16, 4)
    means = [row["measured"]["nll"]["mean"] for row in (full, whole, wide)]
    assert len(set(means)) == 3
    assert wide["measured"]["nll"]["against_first"]["difference"] == pytest.approx(means[2] - means[1])
    assert len(list((tmp_path / "out/cells").iterdir())) == 3


def test_a_study_says_what_it_was_made_with(whole: Path, source: Path) -> None:
    content = json.loads((whole / "study.json").read_bytes())
    assert {"dllmc", "python", "torch", "onnxruntime"} <= set(content["made_with"])
    assert content["code"] == measuring.measuring_code()
    assert content["threads"] == 1
    assert content["models"] == {str(source): model_digest(open_checkpoint(source))}
    recipe = content["rows"][2]["recipe"]
    assert (recipe["method"], recipe["smoothquant"]["alpha"], recipe["calibration"]["samples"]) == (
        "smoothquant",
        0.6,
        8,
    )
    assert "recipe" not in content["rows"][0]


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("binary.txt", b"\xff\xfe\x00", "is not UTF-8"),
        ("short.txt", b"2 + 2 =", "calibration"),
        ("broken.jsonl", b'{"text": "a"}\n{', "line 2 is not JSON"),
    ],
)
def test_a_text_that_cannot_calibrate_ends_the_study_before_it_begins(
    source: Path, tmp_path: Path, name: str, content: bytes, why: str, monkeypatch: pytest.MonkeyPatch, capsys: Out
) -> None:
    def never(order: object) -> dict[str, object]:
        raise AssertionError("nothing is measured with a text that is to be mended")

    monkeypatch.setattr(run, "measure", never)
    (tmp_path / name).write_bytes(content)
    text = f"calibration.source=file:{tmp_path / name}"
    assert main(words(source, tmp_path / "out", "--set", text)) == 4
    assert why in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_text_is_found_by_workers_in_other_folders(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.jsonl").write_text('{"prompt": "1 + 2 = ", "answer": "3 is the answer"}\n' * 9)
    grid = Grid(
        methods=("smoothquant",),
        bits=("w4a4",),
        seeds={"w4a4": 1},
        sets=("calibration.source=file:text.jsonl", "calibration.samples=8"),
    )
    plan = run.make_plan(run.Request(models=(str(source),), grid=grid, tasks=("nll",), sizes=Sizes()))
    recipe = plan.orders[1].recipe
    assert recipe is not None
    assert recipe.calibration.source == f"file:{tmp_path / 'text.jsonl'}"


def test_cells_have_their_files_in_the_folder_of_the_study(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    before, found = tempfile.gettempdir(), []
    (output / "scratch/dllmc-study-of-a-kill").mkdir(parents=True)
    (output / LOCK).touch()

    def look(order: measuring.Order) -> dict[str, object]:
        found.append((tempfile.gettempdir(), os.environ["TMPDIR"], list((output / "scratch").iterdir())))
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "measure", look)
    assert main(words(source, output)) == 130
    assert found == [(str(output / "scratch"), str(output / "scratch"), [])]
    assert tempfile.gettempdir() == before
    assert not (output / "scratch").exists()


def test_a_full_disk_in_a_cell_will_not_fit(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Out
) -> None:
    def full(order: object) -> dict[str, object]:
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "out/scratch/x"))

    monkeypatch.setattr(run, "measure", full)
    assert main(words(source, tmp_path / "out")) == 3
    assert "the disk is full" in capsys.readouterr().err


def test_a_study_that_is_killed_goes_on(whole: Path, source: Path, tmp_path: Path) -> None:
    """As soon as one cell is there; then in this process."""
    output = tmp_path / "out"
    command = [sys.executable, "-m", "pipeline", *words(source, output)]
    with subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}
    ) as process:
        end = time.monotonic() + 120
        while not list((output / "cells").glob("*.json")) and process.poll() is None:
            assert time.monotonic() < end, "no cell was measured"
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert not (output / "study.json").exists()
    kept = len(list((output / "cells").glob("*.json")))
    assert kept >= 1
    assert main(words(source, output)) == 0
    assert same(output, whole)


def test_processes_are_sent_every_cell(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as --jobs says; what they do with cells is tested beside the engines."""
    asked: list[tuple[Any, ...]] = []

    def local(*call: object) -> list[object]:
        asked.append(call)
        raise KeyboardInterrupt

    monkeypatch.setitem(ENGINES, "local", local)
    assert main(words(source, tmp_path / "out", "--jobs", "2")) == 130
    ((measure, orders, jobs),) = asked
    assert pickle.loads(pickle.dumps((measure, orders))) == (measuring.measure, orders)
    assert (len(orders), jobs) == (4, 2)


def test_a_cluster_gives_the_same_bytes(whole: Path, source: Path, tmp_path: Path, cluster: object) -> None:
    """Of one worker: how they share the cells is tested beside the engines."""
    assert main(words(source, tmp_path / "out", "--engine", "ray", "--jobs", "1")) == 0
    assert same(tmp_path / "out", whole)
