"""`dllmc eval`: what it prints, and what it refuses."""

import json

import pytest

from pipeline.__main__ import main
from pipeline.evaluation import evaluate


@pytest.fixture
def task(tmp_path):
    path = tmp_path / "task.jsonl"
    lines = [{"prompt": "hello", "answer": "9"}, {"prompt": "a1", "answer": "b" * 40}]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return path


def test_json_has_the_promised_keys(whole_bundle, task, capsys):
    assert main(["eval", str(whole_bundle), "--task", str(task), "--json", "--gen-length", "10"]) == 0
    captured = capsys.readouterr()
    body = json.loads(captured.out)
    keys = {"exact_match", "count", "nfe", "nfe_full", "tpf", "tokens_per_second", "seconds"}
    assert keys <= set(body)
    assert body["count"] == 2
    assert body["options"]["gen_length"] == 10
    assert body["options"]["block_length"] == 6  # the bundle's own
    assert body["unreachable"] == 1
    assert "1 answers are longer than gen-length 10" in captured.err


def test_plain_output_is_one_line(whole_bundle, task, capsys):
    assert main(["eval", str(whole_bundle), "--task", str(task), "--limit", "1"]) == 0
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert said.startswith("exact match 0.0000 on 1 problems, ")


def test_what_generation_was_like_stands_with_every_score(whole_bundle, task, capsys):
    assert main(["eval", str(whole_bundle), "--task", str(task), "--limit", "1", "--temperature", "0.5"]) == 0
    said = capsys.readouterr().out
    usual = "gen-length 12, block-length 6, policy threshold, threshold 0.6, temperature 0.5, exact no, refresh-every 1"
    assert said.endswith(f"; {usual}\n")


@pytest.mark.parametrize(
    ("words", "exact", "batch_size"),
    [([], False, 32), (["--exact"], True, 1), (["--exact", "--batch-size", "7"], True, 7)],
)
def test_exact_turns_cache_and_batching_off(whole_bundle, task, monkeypatch, words, exact, batch_size):
    seen = []

    def watch(model, items, options, *, batch_size, on_done):
        seen.append((options.exact, batch_size))
        return evaluate(model, items, options, batch_size=batch_size)

    monkeypatch.setattr("pipeline.evaluation.evaluate", watch)
    assert main(["eval", str(whole_bundle), "--task", str(task), *words]) == 0
    assert seen == [(exact, batch_size)]


@pytest.mark.parametrize(
    ("line", "code", "why"), [("{}", 4, "line 3: prompt is None"), ('{"prompt": 1}', 4, "line 3"), ("x", 4, "line 3")]
)
def test_a_malformed_line_is_refused(whole_bundle, task, capsys, line, code, why):
    with task.open("a") as stream:
        stream.write(line)
    assert main(["eval", str(whole_bundle), "--task", str(task)]) == code
    assert why in capsys.readouterr().err


def test_missing_things_are_named(whole_bundle, task, tmp_path, capsys):
    assert main(["eval", str(whole_bundle), "--task", str(tmp_path / "absent.jsonl")]) == 2
    assert "absent.jsonl cannot be read" in capsys.readouterr().err
    assert main(["eval", str(tmp_path / "absent"), "--task", str(task)]) == 4
    assert "absent" in capsys.readouterr().err
    assert main(["eval", str(whole_bundle)]) == 2


@pytest.mark.parametrize("name", ["~nobody_of_this_name/x", "a" * 300, "a/" * 2044 + "a"])
def test_a_model_that_no_path_can_name_is_refused(name, task, capsys):
    assert main(["eval", name, "--task", str(task)]) == 4
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("as_json", [False, True])
def test_opening_shows_life_when_it_takes_time(whole_bundle, task, capsys, monkeypatch, as_json):
    monkeypatch.setattr("pipeline.progress.BAR_AFTER_SECONDS", 0.0)
    assert main(["eval", str(whole_bundle), "--task", str(task), *["--json"] * as_json]) == 0
    captured = capsys.readouterr()
    assert any(line.startswith("load ") for line in captured.err.splitlines()) != as_json
    assert captured.out.count("\n") == 1
