"""`dllmc bench`: the cases it measures, and the form of its report."""

import json

import pytest

from pipeline.__main__ import main

QUICK = ("--prompts", "2", "--prompt-length", "5", "--repeats", "1", "--threads", "1", "--eos", "forbid")


def bench(folder, *words):
    return main(["bench", str(folder), *QUICK, *words])


def test_every_combination_is_measured(whole_bundle, capsys):
    words = ["--policies", "quota, threshold", "--block-lengths", "3,6", "--batch-sizes", "1,2", "--gen-length", "6"]
    assert bench(whole_bundle, *words, "--json") == 0
    body = json.loads(capsys.readouterr().out)
    found = [(case["policy"], case["block_length"], case["batch_size"]) for case in body["cases"]]
    assert found == [(p, n, b) for p in ("quota", "threshold") for n in (3, 6) for b in (1, 2)]
    for case in body["cases"]:
        assert case["tokens"] == 12
        assert case["full_pass_ms"] > 0
        assert case["host_ms_per_step"] > 0
        assert case["transfer_bytes_per_step"] > 0
        assert case["tpf"] == pytest.approx(12 / (case["nfe_full"] + case["nfe_block"]), abs=1e-3)
    assert body["peak_memory_bytes"] > 1e7
    assert body["cache_bytes"] > 0
    assert body["prompts_of"] == "random ids"
    assert "gen-length 6" in body["options"]
    assert "prefill included" in body["definition"]


def test_a_table_for_people(whole_bundle, capsys):
    assert bench(whole_bundle, "--exact") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split(" | ")[:2] == ["| policy   ", "block"]
    assert "threshold" in lines[2]
    assert "exact yes" in lines[3]
    assert "2 prompts of random ids, medians of 1" in lines[3]


def test_stop_texts_stop(whole_bundle, capsys):
    tokens = []
    for stop in ([], ["--stop", "a", "--stop", "b", "--stop", "c", "--stop", "d", "--stop", "e"]):
        assert bench(whole_bundle, *stop, "--json") == 0
        tokens.append(json.loads(capsys.readouterr().out)["cases"][0]["tokens"])
    assert tokens[1] < tokens[0]


def test_prompts_of_a_task(whole_bundle, tmp_path, capsys):
    path = tmp_path / "task.jsonl"
    path.write_text("".join(json.dumps({"prompt": text, "answer": "b"}) + "\n" for text in ("abc", "a", "ab")))
    assert bench(whole_bundle, "--task", str(path), "--json") == 0
    body = json.loads(capsys.readouterr().out)
    assert (body["prompts"], body["prompt_tokens"], body["prompts_of"]) == (2, 4, "task.jsonl")


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--policies", "qota"], "did you mean quota"),
        (["--block-lengths", "0"], "0 is not in the range"),
        (["--block-lengths", "x"], "'x' is not a valid integer"),
        (["--batch-sizes", "0"], "0 is not in the range"),
        (["--prompt-length", "95"], "the model takes 96"),
        (["--task", "absent.jsonl"], "absent.jsonl cannot be read"),
        (["--policy", "quota"], "--policies"),
        (["--guidance", "1"], "lowering.guidance=true"),
    ],
)
def test_what_cannot_be_measured(whole_bundle, capsys, words, why):
    assert bench(whole_bundle, *words) == 2
    assert why in capsys.readouterr().err
