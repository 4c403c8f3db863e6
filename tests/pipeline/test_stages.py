"""The road: finished stages are reused, interrupted ones leave nothing, and one by one they end where export ends."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline import stages
from pipeline.__main__ import main
from pipeline.errors import UsageFault
from pipeline.folder import MODEL, MODEL_DATA, STAGES, read_job
from pipeline.manifest import read_manifest, verify
from pipeline.progress import Stage
from pipeline.recipe import Recipe
from tests.exports import export, settings

ROOT = Path(__file__).parents[2]
Made = Callable[..., Path]
Out = pytest.CaptureFixture[str]


@pytest.fixture
def output(stages_done: Path, tmp_path: Path) -> Path:
    """An output whose work folder has calibrate, quantize and lower finished."""
    shutil.copytree(stages_done, tmp_path / "out.work")
    return tmp_path / "out"


def done(output: Path) -> list[str]:
    """Finished stages, in order."""
    work = output.with_name("out.work")
    return [stage for stage in STAGES if (work / f"{stage}.done.json").exists()]


def test_the_road_is_the_list_of_stages() -> None:
    assert tuple(stages.ROAD) == STAGES


def test_stage_commands_end_where_one_export_ends(output: Path, exported: Made) -> None:
    assert main(["validate", str(output)]) == 0
    assert main(["build", str(output)]) == 0
    assert not output.exists()
    assert main(["bundle", str(output)]) == 0
    assert not output.with_name("out.work").exists()
    whole = exported("rtn-w4a4", "llada", layers=1)
    for name in (MODEL, MODEL_DATA):
        assert (output / name).read_bytes() == (whole / name).read_bytes()
    assert verify(output).identity == verify(whole).identity


def test_finished_stages_are_reused(output: Path, model: Made, monkeypatch: pytest.MonkeyPatch, capsys: Out) -> None:
    def never(*unused: object) -> list[str]:
        raise AssertionError("this stage was done before")

    for stage in ("calibrate", "quantize", "lower"):
        monkeypatch.setitem(stages.ROAD, stage, never)
    assert export(model("llada", layers=1), output, "rtn-w4a4", "--until", "lower") == 0
    error = capsys.readouterr().err
    assert error.count("done before, reused") == 3


@pytest.mark.parametrize("change", ["recipe", "model", "file", "forced", "from"])
def test_what_changed_is_done_again(
    output: Path, model: Made, change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And only that: a stage before the change is reused."""
    ran: list[str] = []
    for stage, act in stages.ROAD.items():
        monkeypatch.setitem(
            stages.ROAD, stage, lambda job, s, stage=stage, act=act: [ran.append(stage), *act(job, s)][1:]
        )
    source, words = model("llada", layers=1), []
    if change == "recipe":
        words = ["--set", "calibration.seed=1"]
    elif change == "model":
        source = Path(shutil.copytree(source, tmp_path / "model"))
        (source / "README.md").write_text("---\nlicense: mit\n---\n")
    elif change == "file":
        path = output.with_name("out.work") / "weights" / "ends.safetensors"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    else:
        words = ["--force"] if change == "forced" else ["--from", "quantize"]
    assert export(source, output, "rtn-w4a4", *words, "--until", "quantize") == 0
    assert ran == (["quantize"] if change in ("file", "from") else ["calibrate", "quantize"])


def test_a_smaller_model_in_the_same_place(output: Path, model: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sidecar files of blocks that the model does not have must not stay."""
    weights = output.with_name("out.work") / "weights"
    shutil.copy(weights / "blocks.0.safetensors", weights / "blocks.1.safetensors")
    assert export(model("llada", layers=1), output, "rtn-w4a4", "--from", "quantize", "--until", "quantize") == 0
    assert sorted(path.stem for path in weights.iterdir()) == ["blocks.0", "constants", "ends"]


def test_a_stage_needs_those_before_it(output: Path, model: Made, tmp_path: Path, capsys: Out) -> None:
    source = str(model("llada", layers=1))
    assert main(["lower", str(tmp_path / "new"), "--model", source, *settings("rtn-w4a4")]) == 2
    assert f"run `dllmc calibrate {tmp_path / 'new'}` first" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "new.work").exists()
    assert main(["bundle", str(output)]) == 2
    assert f"run `dllmc validate {output}` first" in capsys.readouterr().err.splitlines()[-1]
    assert main(["lower", str(output), "--set", "calibration.seed=1"]) == 2
    assert "stage calibrate has not been done" in capsys.readouterr().err.splitlines()[-1]
    assert done(output) == ["calibrate", "quantize", "lower"]
    assert "seed: 1" not in read_job(output)["recipe"]  # what was refused is not what the folder works on


def interrupt_progress(monkeypatch: pytest.MonkeyPatch, unit: str) -> None:
    """Ctrl-C when the stage that counts in `unit` has done two of them."""
    advance = Stage.advance

    def interrupted(self: Stage, count: int, total: int, what: str) -> None:
        advance(self, count, total, what)
        if what == unit and count == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Stage, "advance", interrupted)


def interrupted(*unused: object, **also: object) -> Any:
    raise KeyboardInterrupt


INTERRUPTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "calibrate": lambda patch: interrupt_progress(patch, "pieces"),
    "quantize": lambda patch: interrupt_progress(patch, "pieces"),
    "lower": lambda patch: interrupt_progress(patch, "weights"),
    "validate": lambda patch: interrupt_progress(patch, "passes"),
    "build": lambda patch: patch.setitem(stages.ROAD, "build", interrupted),
    "bundle": lambda patch: patch.setattr("pipeline.bundle.build_manifest", interrupted),
    "publish": lambda patch: patch.setattr("pipeline.folder.sync_tree", interrupted),
}


@pytest.mark.parametrize("place", INTERRUPTS)
def test_ctrl_c_leaves_no_bundle(
    place: str, output: Path, model: Made, monkeypatch: pytest.MonkeyPatch, capsys: Out
) -> None:
    work = output.with_name("out.work")
    stage = "bundle" if place == "publish" else place
    before = STAGES[: STAGES.index(stage)]
    for later in STAGES[STAGES.index(stage) :]:
        (work / f"{later}.done.json").unlink(missing_ok=True)
    words = [str(output), *settings("rtn-w4a4"), "--model", str(model("llada", layers=1))]
    if stage in ("build", "bundle"):
        words += ["--validate", "off"]
        assert main(["validate", *words]) == 0
    if stage == "bundle":
        assert main(["build", *words]) == 0
    with monkeypatch.context() as patch:
        INTERRUPTS[place](patch)
        assert main([stage, *words]) == 130
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("dllmc: interrupted")
    assert "Traceback" not in error
    assert not output.exists()
    assert tuple(done(output)) == before
    assert work.exists() == bool(before)
    assert list(output.parent.rglob("*.tmp")) == []
    if stage == "bundle":
        assert main([stage, *words]) == 0
        assert read_manifest(output).facts["status"] == "unvalidated"


def test_a_real_signal_while_lowering(model: Made, tmp_path: Path) -> None:
    output = tmp_path / "out"
    command = ["export", str(model("llada", layers=1)), "-o", str(output), *settings("rtn-w4a4"), "--json"]
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline", *command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A test runner in the background may have had SIGINT ignored, which children inherit.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout is not None
    for line in process.stdout:
        event = json.loads(line)
        if event["event"] == "stage_start" and event["stage"] == "lower":
            break
    time.sleep(0.5)  # into torch's exporter
    os.kill(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert error.splitlines()[-1].startswith("dllmc: interrupted")
    assert not output.exists()
    assert done(output) == ["calibrate", "quantize"]


def test_without_validation_the_bundle_says_so(output: Path, capsys: Out) -> None:
    for stage in ("validate", "build", "bundle"):
        assert main([stage, str(output), "--validate", "off"]) == 0
    assert read_manifest(output).facts["status"] == "unvalidated"
    assert not (output / "validation.json").exists()
    capsys.readouterr()
    assert main(["run", str(output), "--self-test"]) == 4
    assert "no recorded passes" in capsys.readouterr().err
    assert main(["run", str(output), "--prompt", "sort 2 1:", "--threads", "1"]) == 0


def test_unvalidated_work_does_not_become_a_validated_bundle(output: Path, model: Made) -> None:
    assert main(["validate", str(output), "--validate", "off"]) == 0
    assert main(["build", str(output), "--validate", "off"]) == 0
    assert main(["bundle", str(output)]) == 2
    assert not output.exists()


def test_an_unknown_stage_before_any_work(model: Made, tmp_path: Path) -> None:
    from pipeline.progress import Progress
    from pipeline.recipe_file import load_recipe

    with pytest.raises(UsageFault):
        stages.export(
            str(model("llada", layers=1)),
            tmp_path / "out",
            load_recipe("rtn-w4a4"),
            first="lower",
            report=Progress(),
        )
    assert list(tmp_path.iterdir()) == []


FEW_ROWS = ("--set", "calibration.length=10", "--set", "calibration.samples=8", "--until", "quantize", "--json")


@pytest.mark.parametrize(
    ("recipe", "sets", "advised"),
    [
        ("gptq-w4a4", (), True),
        ("gptq-w4a4", ("skip=[blocks.0.mlp.down_proj]",), False),  # the others read 64 channels at most
        ("quarot-w4a4", (), True),
        ("quarot-w4a4", ("quarot.weights=rtn",), False),
        ("duquant-w4a4", ("duquant.weights=gptq", "duquant.steps=2"), True),
        ("smoothquant-w4a4", (), False),
        ("rtn-w4a4", (), None),
    ],
)
def test_rows_that_cannot_fill_a_hessian_are_told(
    recipe: str, sets: tuple[str, ...], advised: bool | None, model: Made, tmp_path: Path, capsys: Out
) -> None:
    """Of the canvases the stage says how many rows they gave; eight of ten tokens are fewer than 96 channels."""
    words = [word for setting in ("threads=1", *sets) for word in ("--set", setting)]
    command = ["export", str(model("llada", layers=1)), "-o", str(tmp_path / "out"), "--recipe", recipe]
    assert main([*command, *FEW_ROWS, *words]) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    (line,) = (event["summary"] for event in events if event.get("stage") == "quantize" and "summary" in event)
    learned = {True: "learned from 80 rows for 96 channels: more with --set calibration.samples=10"}
    learned[False] = "learned from 80 rows"
    assert line.partition("; learned")[2] == (learned[advised].removeprefix("learned") if advised is not None else "")
    assert bool(re.search(r"; \d+\.\d s a block; learned", line)) == (advised is not None)


@pytest.mark.parametrize(
    ("recipe", "share", "said"),
    [
        ("freeact-w4a4", 16, "gates keep for each state 1/16 of the input channels"),
        (
            "freeact-w4a4",
            32,  # a slice of 2 heads x 16 channels is at least a sixteenth
            "gates keep for each state 1/32 of the input channels of q_k_v_proj, down_proj, gate_up_proj and 1/16 of "
            "the input channels of o_proj",
        ),
        ("star-w4a4", 16, "gates keep for each state 1/16 of the input channels"),
        ("flatquant-w4a4", 32, ""),
    ],
)
def test_what_gates_really_take_is_told(
    recipe: str, share: int, said: str, model: Made, tmp_path: Path, capsys: Out
) -> None:
    quick = ["flatquant.epochs=1", "star.epochs=0", "tac.form=none", "threads=1"]
    sets = [f"--set={each}" for each in (*quick, f"freeact.share={share}", f"star.share={share}")]
    command = ["export", str(model("llada", layers=1)), "-o", str(tmp_path / "out"), "--recipe", recipe]
    assert main([*command, *FEW_ROWS, *sets]) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    (line,) = (event["summary"] for event in events if event.get("stage") == "quantize" and "summary" in event)
    assert line.partition("; gates")[2] == said.removeprefix("gates")


def test_every_key_of_the_recipe_makes_its_stages_again() -> None:
    """A key that is in no stage's list would change nothing on a repeated command."""
    words = {"schema_version", "name", "description", "generation"}  # in the bundle alone
    assert set(stages.READS["validate"]) | words == set(Recipe.model_fields)
    assert stages.READS["quantize"] == tuple(
        key for key in stages.READS["validate"] if key not in ("lowering", "validation")
    )
