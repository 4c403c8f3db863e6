"""The command, on a CPU: what it measures, what it writes, and what it must not write."""

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import bench.gpu.__main__ as command
from bench.gpu import machine
from bench.gpu.cases import all_cases
from bench.gpu.machine import Machine
from bench.gpu.section import Plan, Row, Section, measure, read_rows
from plugins import toolchain
from plugins.toolchain import ToolMissingError

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
    assert command.main(arguments) == command.UNFINISHED
    assert "gemm: the budget ends before" in capsys.readouterr().out
    assert not (tmp_path / "passes.json").exists()


@pytest.mark.parametrize("arguments", [["--only", "gem"], ["--methods", "star,rnt"]])
def test_unknown_names_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main([*arguments, "--emulate"])
    assert "expected some of" in capsys.readouterr().err


@pytest.mark.parametrize("number", ["0", "-3", "1.5", "", "x"])
def test_every_takes_whole_numbers_from_1_on(number: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main(["--emulate", "--every", number])
    assert ended.value.code == 2
    assert f"--every: got {number!r}, expected a whole number" in capsys.readouterr().err


def refused(capsys: pytest.CaptureFixture[str], work: Path, *arguments: str) -> str:
    """The line with which the command ends; it has measured nothing."""
    assert command.main(["--work", str(work), *arguments]) == command.UNUSABLE
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert not list(work.glob("*.json"))
    return said.err.removeprefix("bench.gpu: ").rstrip("\n")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """`gpu(7, 5)`: torch sees a GPU of that compute capability, and no call reaches a device."""

    def seen(major: int, minor: int) -> None:
        known = {"is_available": True, "set_device": None, "get_device_name": "Some GPU"}
        for name, value in {**known, "get_device_capability": (major, minor)}.items():
            monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
        monkeypatch.setattr(torch, "zeros", lambda *_, **__: None)

    return seen


def test_without_a_gpu_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch sees no CUDA device" in refused(capsys, tmp_path)


def test_an_old_gpu_is_refused_by_name(
    gpu: Callable[[int, int], None], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    gpu(7, 5)
    assert refused(capsys, tmp_path) == "Some GPU: got compute capability 7.5, expected 8.0 or newer"


def test_without_nvcc_it_says_so(
    gpu: Callable[[int, int], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    def missing(name: str) -> Path:
        raise ToolMissingError(f"no CUDA program {name}")

    gpu(9, 0)
    monkeypatch.setattr(toolchain, "cuda_program", missing)
    assert refused(capsys, tmp_path) == "no CUDA program nvcc"


def test_a_build_that_fails_says_its_error(
    gpu: Callable[[int, int], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    compiler = tmp_path / "nvcc"
    said = "echo 'In file included from a.cu' >&2\necho 'ptxas fatal: no such arch' >&2"
    compiler.write_text(f"#!/bin/sh\n{said}\nexit 1\n")
    compiler.chmod(0o755)
    gpu(9, 0)
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.setattr(toolchain, "nvcc", lambda: compiler)
    assert refused(capsys, tmp_path) == "ptxas fatal: no such arch"


def test_emulation_without_a_compiler_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert refused(capsys, tmp_path, "--emulate") == "no C++ compiler (no-such-compiler)"


def test_a_library_that_does_not_load_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    absent, text = tmp_path / "absent.so", tmp_path / "text.so"
    text.write_text("no library")
    for library in (absent, text):
        assert str(library) in refused(capsys, tmp_path, "--emulate", "--library", str(library))
    [other, *_] = Path(sys.base_prefix, "lib").rglob("lib-dynload/*.so")
    assert f"{other.resolve()} was not built from these kernels" in refused(
        capsys, tmp_path, "--emulate", "--library", str(other)
    )


@pytest.mark.usefixtures("simulating")
def test_a_folder_that_cannot_be_made_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "Not a directory" in refused(capsys, tmp_path / "file" / "work", "--emulate")


def _section(name: str, row: Row) -> Section:
    return Section(name=name, about="", items=lambda plan: iter([("only", lambda: dict(row))]), said=str, slowest_s=1.0)


@pytest.mark.parametrize(
    ("wrong", "budget_s", "code"),
    [({}, "60", 0), ({"case": "off"}, "60", 1), ({"case": "off"}, "0.5", 3), ({}, "0.5", 3)],
    ids=["measured", "failed", "failed so far", "not measured"],
)
@pytest.mark.parametrize("emulated", [True, False])
def test_the_exit_code_tells_of_all_that_was_asked_for(
    emulated: bool,
    wrong: dict[str, str],
    budget_s: str,
    code: int,
    simulated: Machine,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Of correctness and one more section; with too small a budget correctness is there from an earlier call."""
    ran = {f"{case.op} {case.path}" for case in all_cases()}
    checked: Row = {"checked": 9, "by_path": dict.fromkeys(ran, 1), "refused": {}, "wrong": wrong}
    sections = [_section("correctness", checked), _section("ceilings", {})]
    monkeypatch.setattr(command, "SECTIONS", {section.name: section for section in sections})
    monkeypatch.setattr(Machine, "identity", lambda self: {"device": "d", "arch": 90, "torch": "t", "kernels": "k"})
    monkeypatch.setattr(Machine, "describe", Machine.identity)
    monkeypatch.setattr(Machine, "clocks", lambda self: {})
    chosen = dataclasses.replace(simulated, emulated=emulated)
    monkeypatch.setattr(Machine, "arch", 90)
    monkeypatch.setattr(command, "open_machine", lambda options: chosen)
    arguments = ["--work", str(tmp_path), "--results", str(tmp_path / "results")]
    assert command.main([*arguments, "--only", "correctness"]) == bool(wrong), "other lines wait, but nobody asked"
    assert command.main([*arguments, "--only", "correctness,ceilings", "--budget-s", budget_s]) == code


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
