"""`dllmc score`: what it prints, and texts that have no likelihood."""

import json

import pytest

from pipeline.__main__ import main
from pipeline.runner.runner import Runner

PLUS = ("--prompt", "ab", "--answer", "cde")


@pytest.fixture(scope="module")
def scoring(exported):
    """A bundle with the graph that scores."""
    return exported("rtn-w8a8", "llada")


def test_the_command_says_what_the_runner_computes(scoring, capsys):
    expected = Runner(scoring, 1).score("ab", "cde", samples=8, seed=3)
    words = [*PLUS, "--samples", "8", "--seed", "3", "--threads", "1"]
    assert main(["score", str(scoring), *words, "--json"]) == 0
    body = json.loads(capsys.readouterr().out)
    assert body["bits"] == pytest.approx(expected.bits, abs=1e-5)
    assert body["bits_per_token"] == pytest.approx(expected.bits / expected.tokens, abs=1e-5)
    assert body["samples"] == 8
    assert main(["score", str(scoring), *words]) == 0
    assert capsys.readouterr().out.startswith(f"at most {body['bits']:.3f} bits, ")


def test_guidance_is_said_here_and_needs_no_graph_of_its_own(scoring, capsys):
    runner = Runner(scoring, 1)
    expected = runner.score("ab", "cde", samples=8, guidance=1.5)
    assert expected.bits != pytest.approx(runner.score("ab", "cde", samples=8).bits, rel=0.01)
    assert main(["score", str(scoring), *PLUS, "--samples", "8", "--guidance", "1.5", "--threads", "1", "--json"]) == 0
    body = json.loads(capsys.readouterr().out)
    assert (body["bits"], body["nfe"]) == (pytest.approx(expected.bits, abs=1e-5), 16)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ([*PLUS, "--guidance", "-1"], "guidance is -1.0; expected 0 or more"),
        (["--prompt", "a", "--answer", ""], "the answer has no tokens"),
        (["--prompt", "a"], "--answer"),
        ([*PLUS, "--samples", "0"], "--samples"),
    ],
)
def test_what_cannot_be_scored(scoring, capsys, words, why):
    assert main(["score", str(scoring), *words]) == 2
    assert why in capsys.readouterr().err


def test_a_bundle_without_the_graph_cannot_score(whole_bundle, capsys):
    assert main(["score", str(whole_bundle), *PLUS]) == 2
    assert "score" in capsys.readouterr().err
