"""The command, on a CPU: what it measures, what it writes, and what it must not write."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import bench.gpu.__main__ as command
from bench.gpu.machine import Machine
from bench.gpu.section import Plan, measure, read_rows

NUMBERS = ("ceilings", "gemm", "elementwise", "passes", "loops")


@pytest.fixture
def simulating(simulated: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "open_machine", lambda options: simulated)


@pytest.mark.usefixtures("simulating")
def test_emulation_runs_every_section_and_writes_no_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "results"
    arguments = ["--emulate", "--work", str(tmp_path), "--results", str(results), "--every", "30"]
    assert command.main(arguments) == 0
    said = capsys.readouterr().out
    assert "emulation on a CPU" in said
    assert not results.exists()
    for name in ("correctness", *NUMBERS):
        content = read_rows(tmp_path, name)
        assert content["identity"]["device"] == "emulation"
        assert content["rows"], name
    assert read_rows(tmp_path, "sanitizer")["rows"] == {}
    loops = read_rows(tmp_path, "loops")["rows"]["tiny-dream star"]
    assert loops["canvas 48 cached"]["ours"]["tokens_per_s"] > 0
    passes = read_rows(tmp_path, "passes")["rows"]["tiny-llada star"]
    assert passes["weight_bytes"]["int8 head"] < passes["weight_bytes"]["bf16"]
    assert passes["weight_bytes"]["int8 head and embedding"] < passes["weight_bytes"]["int8 head"]


@pytest.mark.usefixtures("simulating")
def test_a_budget_and_chosen_sections(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--emulate", "--work", str(tmp_path), "--only", "gemm,ceilings", "--budget-s", "0"]
    assert command.main(arguments) == 0
    assert "gemm: the budget ends before" in capsys.readouterr().out
    assert not (tmp_path / "passes.json").exists()


@pytest.mark.parametrize("arguments", [["--only", "gem"], ["--methods", "star,rnt"]])
def test_unknown_names_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main([*arguments, "--emulate"])
    assert "expected some of" in capsys.readouterr().err


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device"):
        command.main([])


def test_results_are_collected_from_this_machine_only(plan: Callable[..., Plan], simulated: Machine) -> None:
    chosen = plan()
    for name in ("ceilings", "gemm"):
        measure(command.SECTIONS[name], chosen, again=False)
    path = chosen.work / "gemm.json"
    content = json.loads(path.read_text())
    content["identity"]["device"] = "another"
    path.write_text(json.dumps(content))
    collected, judged = command.collect(simulated, chosen.work, list(command.SECTIONS))
    assert set(collected["sections"]) == {"ceilings"}  # type: ignore[call-overload]
    assert all(verdict.outcome == "waiting" for verdict in judged)
    assert {"date", "machine", "verdicts", "sections"} == set(collected)
