"""`dllmc run`: plain output, JSON, the canvas on a terminal, exit codes."""

import json
import subprocess
import sys
import time

import pytest

from pipeline.__main__ import main
from pipeline.folder import MANIFEST
from pipeline.runner.policies import POLICIES
from tests.pipeline.cli.terminal import on_a_terminal
from tests.pipeline.random_models import seal

KEYS = {
    *("text", "ids", "finish_reason", "prompt_tokens", "seconds", "tokens_per_second"),
    *("nfe", "nfe_full", "nfe_block", "tpf", "agreement", "step_map", "logprobs"),
}


def dllmc(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    """Nothing takes long, however busy this machine is."""
    monkeypatch.setattr("pipeline.progress.BAR_AFTER_SECONDS", 1e9)


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize(
    ("words", "stages"),
    [
        (["run", "--prompt", "hello"], ["load"]),
        (["run", "--self-test"], ["load", "self-test"]),
        (["verify"], ["verify"]),
    ],
)
def test_what_takes_time_shows_life(whole_bundle, capsys, monkeypatch, words, stages, as_json):
    monkeypatch.setattr("pipeline.progress.BAR_AFTER_SECONDS", 0.0)
    assert dllmc(words[0], whole_bundle, *words[1:], *["--json"] * as_json) == 0
    captured = capsys.readouterr()
    assert [line.split()[0] for line in captured.err.splitlines()] == ([] if as_json else stages)
    assert captured.out.count("\n") == 1


@pytest.mark.parametrize("words", [["run", "--prompt", "hello"], ["verify"], ["eval", "--task"]])
def test_bytes_are_counted_while_files_are_checked(whole_bundle, tmp_path, monkeypatch, words):
    (tmp_path / "task.jsonl").write_text('{"prompt": "a", "answer": "b"}')
    seen = []
    monkeypatch.setattr("pipeline.progress.Stage.advance_bytes", lambda self, done, total: seen.append((done, total)))
    assert dllmc(words[0], whole_bundle, *words[1:], *[tmp_path / "task.jsonl"] * ("--task" in words)) == 0
    size = sum(path.stat().st_size for path in whole_bundle.rglob("*") if path.is_file() and path.name != MANIFEST)
    assert seen[-1] == (size, size)


def test_replays_are_counted(whole_bundle, capsys, monkeypatch):
    monkeypatch.setattr("pipeline.progress.BAR_AFTER_SECONDS", 0.0)
    assert dllmc("run", whole_bundle, "--self-test") == 0
    assert "1/1 passes" in capsys.readouterr().err


def test_the_text_is_all_that_goes_to_standard_output(whole_bundle, capsys):
    assert dllmc("run", whole_bundle, "--prompt", "hello") == 0
    plain = capsys.readouterr()
    assert dllmc("run", whole_bundle, "--prompt", "hello", "--json") == 0
    body = json.loads(capsys.readouterr().out)
    assert plain.out == body["text"] + "\n"
    assert plain.err == ""
    assert set(body) == KEYS
    assert body["prompt_tokens"] == 5
    assert body["nfe"] == body["nfe_full"] + body["nfe_block"]
    assert body["tpf"] == pytest.approx(len(body["ids"]) / body["nfe"], abs=1e-4)
    assert len(body["step_map"]) == len(body["logprobs"]) == 12


def test_options_reach_the_loop(whole_bundle, capsys):
    options = ["--gen-length", 9, "--block_length", 3, "--steps", 9, "--policy", "quota", "--temperature", 2.0]
    options += ["--eos", "forbid"]
    bodies = []
    for seed in (1, 1, 2):
        assert dllmc("run", whole_bundle, "--prompt", "z9", *options, "--seed", seed, "--json") == 0
        bodies.append(json.loads(capsys.readouterr().out))
    assert bodies[0]["ids"] == bodies[1]["ids"] != bodies[2]["ids"]
    assert all(body["nfe"] <= 9 for body in bodies)


@pytest.mark.parametrize(
    ("arguments", "code", "why"),
    [
        ([], 2, "pass one of --prompt TEXT, --infill TEXT and --self-test"),
        (["--prompt", "a", "--self-test"], 2, "pass one of"),
        (["--prompt", "a", "--infill", "a"], 2, "pass one of"),
        (["--infill", "a"], 2, "no gap to fill"),
        (["--prompt", "a<mask>"], 2, "holds the model's mask token"),
        (["--prompt", "a", "--block-length", "0"], 2, "block-length"),
        (["--prompt", "a" * 95], 2, "the model takes 96"),
        (["--prompt", "a", "--policy", "qota"], 2, "did you mean quota"),
        (["--prompt", "a", "--threshold", "2"], 2, "threshold is 2.0"),
        (["--prompt", "a", "--gen-length", "0"], 2, "gen-length"),
    ],
)
def test_wrong_use_says_what_is_wrong(whole_bundle, capsys, arguments, code, why):
    assert dllmc("run", whole_bundle, *arguments) == code
    captured = capsys.readouterr()
    assert why in captured.err
    assert captured.out == ""


def test_infill_writes_the_gaps(whole_bundle, capsys):
    assert dllmc("run", whole_bundle, "--infill", "ab<mask:3>c", "--eos", "forbid") == 0
    text = capsys.readouterr().out
    assert (text[:2], text[5:]) == ("ab", "c\n")


def test_exact_computes_every_pass_in_full(whole_bundle, capsys):
    assert dllmc("run", whole_bundle, "--prompt", "hello", "--policy", "quota", "--exact", "--json") == 0
    body = json.loads(capsys.readouterr().out)
    assert body["nfe_block"] == 0
    assert body["nfe_full"] > 2


def test_a_spoilt_bundle_does_not_run(bundle, capsys):
    with (bundle / "model.onnx.data").open("r+b") as stream:
        stream.write(b"\x00\x01")
    assert dllmc("run", bundle, "--prompt", "a") == 7
    assert "model.onnx.data" in capsys.readouterr().err


def test_no_bundle_is_refused(tmp_path, capsys):
    assert dllmc("run", tmp_path / "absent", "--prompt", "a") == 4
    assert "not a folder" in capsys.readouterr().err


def test_self_test(whole_bundle, bundle, capsys):
    assert dllmc("run", whole_bundle, "--self-test") == 0
    assert capsys.readouterr().out.startswith("1 of 1 recorded passes replayed")
    assert dllmc("run", whole_bundle, "--self-test", "--json") == 0
    assert json.loads(capsys.readouterr().out)["passes"] == 1
    path = bundle / "golden" / "step-0.json"
    golden = json.loads(path.read_text())
    golden["record"]["lse_t"][0][0] += 1.0
    path.write_text(json.dumps(golden))
    seal(bundle)
    assert dllmc("run", bundle, "--self-test") == 5
    assert "lse_t differs by 1" in capsys.readouterr().err


def test_help_names_every_policy(capsys):
    assert dllmc("run", "--help") == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in POLICIES)


def test_help_is_quick():
    started = time.monotonic()
    subprocess.run([sys.executable, "-m", "pipeline", "run", "--help"], check=True, capture_output=True)
    assert time.monotonic() - started <= 2.0  # 0.1 s alone; this machine may be busy


def test_on_a_terminal_the_canvas_fills_in(whole_bundle):
    command = [sys.executable, "-m", "pipeline", "run", str(whole_bundle), "--prompt", "hello", "--policy", "quota"]
    shown, text = on_a_terminal(command)
    assert "\u2591" in shown.decode()
    assert b"\x1b[J" in shown
    assert b"passes" in shown
    assert "\x1b" not in text
