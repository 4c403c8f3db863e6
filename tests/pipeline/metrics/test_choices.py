"""Questions have one right answer among equals; likelihoods against plain sums over masks, and exact where known."""

import math
import random
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import UsageFault
from pipeline.metrics.choices import (
    WRONG,
    Question,
    choice_score,
    option_bits,
    questions,
    slip,
    swap,
)
from pipeline.metrics.probe import Probe
from pipeline.runner.scoring import stratified_masks
from pipeline.tiny.problems import KINDS, held_out
from tests.pipeline.metrics.probes import probes
from tests.pipeline.random_models import EOS, LETTERS, MASK, V, tokenizer

PROBLEMS = held_out(120, seed=3)
ASKED = questions(PROBLEMS, seed=1)
QUESTION = Question(kind="copy", prompt="abc", options=("abcd", "abed", "xbcd", "abcdef"), right=0)


def form(text):
    """Digits and letters are interchangeable, but a leading zero is not a digit like others."""
    return re.sub(r"[a-z]", "a", re.sub(r"[0-9]", "1", text))


def test_every_kind_goes_wrong():
    assert WRONG.keys() == KINDS.keys()


def test_questions_have_one_right_answer_of_one_form():
    for problem, question in zip(PROBLEMS, ASKED, strict=True):
        assert (question.kind, question.prompt) == (problem.kind, problem.prompt)
        assert question.options[question.right] == problem.answer
        assert len(set(question.options)) == len(question.options) == 4
        assert len({form(option) for option in question.options}) == 1
        for option in question.options:
            if problem.kind in ("sort", "reverse"):
                assert sorted(option) == sorted(problem.answer)
            elif option != problem.answer:
                assert sum(a != b for a, b in zip(option, problem.answer, strict=True)) == 1
    places = Counter(question.right for question in ASKED)
    assert all(15 <= places[place] <= 45 for place in range(4))
    assert questions(PROBLEMS[5:], seed=1) == ASKED[5:]
    assert questions(PROBLEMS, seed=2) != ASKED


@given(st.integers(0, 999), st.sampled_from(["7", "a", "0", '{"x":0}', "10+5=15", "a1"]))
def test_a_slip_changes_one_letter_or_digit(seed, answer):
    wrong = slip(random.Random(seed), answer)
    (place,) = (i for i, (a, b) in enumerate(zip(wrong, answer, strict=True)) if a != b)
    assert form(wrong[place]) == form(answer[place])
    assert wrong[place] != "0"


@given(st.integers(0, 99), st.lists(st.integers(0, 2), min_size=2, max_size=5))
def test_a_swap_moves_two_items(seed, digits):
    answer = " ".join(map(str, digits))
    wrong = swap(random.Random(seed), answer)
    assert wrong != answer
    assert (sorted(wrong) == sorted(answer)) == (len(set(digits)) > 1)


@pytest.mark.parametrize("shifted", [False, True], ids=["llada", "dream"])
def test_against_a_plain_sum_over_masks(shifted):
    model, probe, _, _, settings = probes(shifted=shifted)
    found = option_bits(probe, tokenizer(), settings, QUESTION, samples=6, key="k", size=5)
    prompt = [LETTERS.index(c) for c in QUESTION.prompt]
    for option, bits in zip(QUESTION.options, found, strict=True):
        answer = [LETTERS.index(c) for c in option]
        losses = []
        for mask in stratified_masks(len(answer), 6, random.Random(f"k/{len(answer)}")):
            ids = [*prompt, *(MASK if i in mask else token for i, token in enumerate(answer)), EOS]
            with torch.no_grad():
                every = torch.arange(len(ids))[None]
                logits = model.logits(torch.tensor([ids]), every, torch.tensor([len(ids)]))[0].double()
            logits[:, [MASK, *range(settings.vocab_size, V)]] = -math.inf
            log_p = logits.log_softmax(-1)
            total = -sum(float(log_p[len(prompt) + i - shifted, answer[i]]) for i in mask)
            losses.append(total / math.log(2) / (len(mask) / len(answer)))
        assert bits == pytest.approx(np.mean(losses), rel=1e-4)


def fixed_probe(log_p):
    """Whatever the canvas, position i has the distribution `log_p`[i]."""

    def graph(ids, positions, kv_len, index, bias, inv_temp):
        logits = log_p[index]
        return (*torch.ops.dllmc.record(logits, bias, inv_temp, 4), logits, logits)

    return Probe(graph, top_k=4)


def test_independent_positions_give_their_exact_likelihood():
    """There the bound is tight: -log2 p is the sum over positions."""
    settings = probes(shifted=False)[-1]
    banned = [MASK, *range(settings.vocab_size, V)]
    logits = torch.randn(16, V)
    logits[:, banned] = -50.0
    log_p = logits.log_softmax(-1)
    found = option_bits(fixed_probe(log_p), tokenizer(), settings, QUESTION, samples=3000, key="k", size=3000)
    for option, bits in zip(QUESTION.options, found, strict=True):
        exact = -sum(float(log_p[3 + i, LETTERS.index(c)]) for i, c in enumerate(option)) / math.log(2)
        assert bits == pytest.approx(exact, rel=0.02)


def test_score_counts_the_likeliest():
    settings = probes(shifted=False)[-1]
    logits = torch.zeros(16, V)
    for place, letter in enumerate("abcd"):
        logits[3 + place, LETTERS.index(letter)] = 5.0
    probe = fixed_probe(logits)
    wrong = Question(kind="add", prompt="abc", options=QUESTION.options[:3], right=2)
    score = choice_score(probe, tokenizer(), settings, [QUESTION, wrong], samples=8)
    assert score.right.values == (1.0, 0.0)
    assert {kind: sums.values for kind, sums in score.kinds.items()} == {"copy": (1.0,), "add": (0.0,)}
    assert choice_score(probe, tokenizer(), settings, [QUESTION, wrong], samples=8) == score
    # Options of equal length share their masks, so only the wrong letter weighs.
    weights = [4 / len(mask) * (0 in mask) for mask in stratified_masks(4, 8, random.Random("0/1/4"))]
    assert score.margin.values[1] == pytest.approx(-np.mean(weights) * 5.0 / math.log(2))


def test_an_option_without_tokens_or_with_too_many_is_refused():
    _, probe, _, _, settings = probes(shifted=False)
    with pytest.raises(UsageFault, match="has 8 tokens; the model takes 7"):
        choice_score(probe, tokenizer(), replace(settings, max_length=7), [QUESTION], samples=2)
    empty = Question(kind="copy", prompt="abc", options=("a", " "), right=0)
    with pytest.raises(ValueError, match="no tokens"):
        choice_score(probe, tokenizer(), settings, [empty], samples=2)
