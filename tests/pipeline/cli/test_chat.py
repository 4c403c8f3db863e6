"""`dllmc chat`: turns over a pipe and on a terminal, and what cannot be talked with."""

import io
import json
import sys

import pytest

from pipeline.__main__ import main
from pipeline.folder import TOKENIZER_CONFIG
from pipeline.runner import Runner
from tests.pipeline.cli.terminal import on_a_terminal
from tests.pipeline.random_models import PAD, seal

TEMPLATE = "{% for m in messages %}{{ m.role[0] ~ m.content ~ pad_token }}{% endfor %}a"


@pytest.fixture
def talking(bundle):
    """A bundle with a chat template."""
    content = {"chat_template": TEMPLATE, "special_ids": {"pad_token": PAD}}
    (bundle / TOKENIZER_CONFIG).write_text(json.dumps(content))
    seal(bundle)
    return bundle


def say(monkeypatch, text):
    monkeypatch.setattr("sys.stdin", io.StringIO(text))


def turns(bundle, said, system=None, **options):
    """What the model answers, one turn after the other."""
    runner, messages, answers = Runner(bundle, 1), [], []
    if system is not None:
        messages.append({"role": "system", "content": system})
    for text in said:
        messages.append({"role": "user", "content": text})
        answers.append(runner.chat(messages, eos="forbid", **options).text)
        messages.append({"role": "assistant", "content": answers[-1]})
    return answers


def test_every_line_is_a_turn_of_one_conversation(talking, monkeypatch, capsys):
    say(monkeypatch, "hi\n\n  \nso it goes\n")
    assert main(["chat", str(talking), "--eos", "forbid"]) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines() == turns(talking, ["hi", "so it goes"])
    assert captured.err == ""


def test_the_system_turn_comes_first(talking, monkeypatch, capsys):
    say(monkeypatch, "hi")
    assert main(["chat", str(talking), "--eos", "forbid", "--system", "be brief"]) == 0
    with_system, without = turns(talking, ["hi"], "be brief"), turns(talking, ["hi"])
    assert capsys.readouterr().out.splitlines() == with_system != without


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ([], "no chat template"),
        (["--visual"], "--visual draws on a terminal"),
        (["--threshold", "7"], "no chat template"),
    ],
)
def test_a_model_that_cannot_chat_says_so_before_it_asks(whole_bundle, monkeypatch, capsys, words, why):
    monkeypatch.setattr("builtins.input", lambda *words: pytest.fail("it asked"))
    assert main(["chat", str(whole_bundle), *words]) == 2
    captured = capsys.readouterr()
    assert why in captured.err
    assert captured.out == ""


def test_a_conversation_that_is_too_long_ends(talking, monkeypatch, capsys):
    say(monkeypatch, "hi\n" + "a" * 90 + "\n")
    assert main(["chat", str(talking), "--eos", "forbid"]) == 2
    captured = capsys.readouterr()
    assert captured.out.splitlines() == turns(talking, ["hi"])
    assert "the model takes 96" in captured.err


def test_on_a_terminal_the_canvas_fills_in_with_colours(talking):
    words = ["chat", str(talking), "--visual", "--eos", "forbid", "--policy", "quota"]
    command = [sys.executable, "-m", "pipeline", *words]
    typed = b"hi\n\x04"  # a line, and end-of-file
    shown, text = on_a_terminal(command, env={"TERM": "xterm", "NO_COLOR": ""}, typed=typed)
    assert b"\x1b[2m\xe2\x96\x91" in shown  # masks, dim
    assert any(b"\x1b[" + colour + b"m" in shown for colour in (b"31", b"32", b"33"))
    assert turns(talking, ["hi"], policy="quota")[0] in text
    assert "\x1b" not in text
