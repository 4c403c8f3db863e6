"""Likelihoods against the study's, draw by draw; long answers in pieces; what cannot be scored."""

import math
import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as settings_of_tests
from hypothesis import strategies as st

from pipeline.backends.guided import EagerGuided
from pipeline.backends.score import EagerScore
from pipeline.errors import InputRefused, UsageFault, ValidationFailed
from pipeline.metrics.choices import Question, option_bits
from pipeline.metrics.probe import Probe
from pipeline.runner import scoring
from pipeline.runner.loop import logit_bias
from pipeline.runner.scoring import batch_feeds, batches, row_logits, score, scored_canvas, stratified_masks
from tests.pipeline.metrics.probes import probes
from tests.pipeline.random_models import EOS, LETTERS, MASK, V, tokenizer

QUESTION = Question(kind="copy", prompt="abc", options=("abcd", "abed", "xbcd", "abcdefghij"), right=0)


def ids_of(text: str) -> list[int]:
    return [LETTERS.index(letter) for letter in text]


@pytest.mark.parametrize("shifted", [False, True], ids=["llada", "dream"])
def test_equals_the_study_on_equal_draws(shifted: bool) -> None:
    model, probe, _, _, settings = probes(shifted=shifted)
    expected = option_bits(probe, tokenizer(), settings, QUESTION, samples=7, key="5", size=64)
    for option, bits in zip(QUESTION.options, expected, strict=True):
        answer = ids_of(option)
        found = score(EagerScore(model), settings, ids_of(QUESTION.prompt), answer, samples=7, seed=5)
        # ln p of a masked token is rounded to float32 once, and padding to a multiple of 16 changes sums in float32.
        assert found.bits == pytest.approx(bits, rel=1e-5)
        assert (found.tokens, found.samples, found.nfe) == (len(answer), 7, 7)
        assert found.bits_per_token == found.bits / len(answer)


def test_an_answer_in_pieces_has_the_same_score(monkeypatch: pytest.MonkeyPatch) -> None:
    model, *_, settings = probes(shifted=False)
    prompt, answer = ids_of("abc"), ids_of("abcdefghij")
    whole = score(EagerScore(model), settings, prompt, answer, samples=10)
    monkeypatch.setattr(scoring, "HEAD_ROWS", 3)
    monkeypatch.setattr(scoring, "LOGITS_A_PASS", 7 * V)
    pieces = score(EagerScore(model), settings, prompt, answer, samples=10)
    assert pieces.bits == pytest.approx(whole.bits, rel=1e-6)
    # Each number of masks stands once among ten samples: ceil(k / 3) pieces of k masks.
    assert (whole.nfe, pieces.nfe) == (10, sum(-(-k // 3) for k in range(1, 11)))


@settings_of_tests(max_examples=6)
@given(st.integers(0, 3), st.integers(1, 4))
def test_batches_do_not_matter(seed: int, batch_size: int) -> None:
    model, *_, settings = probes(shifted=True)
    alone = [
        score(EagerScore(model), settings, ids_of("ab"), ids_of("cdef"), samples=5, seed=seed, batch_size=size)
        for size in (1, batch_size)
    ]
    assert alone[0].bits == pytest.approx(alone[1].bits, rel=1e-6)


@pytest.mark.parametrize("shifted", [False, True], ids=["llada", "dream"])
@pytest.mark.parametrize("strength", [0.5, 2.0])
def test_guided_scores_are_those_of_plain_torch(shifted: bool, strength: float) -> None:
    """The study draws the masks and weighs them; the model that it asks is a guided one."""
    model, probe, _, _, settings = probes(shifted=shifted)
    prompt = ids_of(QUESTION.prompt)

    def graph(ids: torch.Tensor, *rest: torch.Tensor) -> tuple[torch.Tensor, ...]:
        promptless = ids.clone()
        promptless[:, : len(prompt)] = MASK
        *record, with_prompt, hidden = probe.graph(ids, *rest)
        *_, without, _ = probe.graph(promptless, *rest)
        return *record, with_prompt.double() + strength * (with_prompt.double() - without), hidden

    guided = Probe(graph, top_k=probe.top_k)
    expected = option_bits(guided, tokenizer(), settings, QUESTION, samples=7, key="5", size=64)
    for option, bits in zip(QUESTION.options, expected, strict=True):
        found = score(EagerScore(model), settings, prompt, ids_of(option), samples=7, seed=5, guidance=strength)
        assert found.bits == pytest.approx(bits, rel=1e-5)
        assert found.nfe == 14


def test_seeds_draw_other_masks_and_a_seed_the_same() -> None:
    model, *_, settings = probes(shifted=False)
    found = [
        score(EagerScore(model), settings, [], ids_of("abcde"), samples=3, seed=seed).bits for seed in (0, 1, 2, 0)
    ]
    assert found[0] == found[3]
    assert len(set(found)) == 3


class Independent:
    """Whatever the canvas, position i has the distribution `log_p`[i]; what else it was asked is kept."""

    def __init__(self, log_p: np.ndarray) -> None:
        self.log_p = log_p
        self.sizes: list[int] = []

    def log_probabilities(self, feeds, target_ids):
        self.sizes.append(feeds.head_index.size * V)
        assert (feeds.input_ids[np.arange(len(feeds.kv_len))[:, None], feeds.head_index] == MASK).all()
        assert (feeds.logit_bias == logit_bias(probes(shifted=False)[-1])).all()
        return self.log_p[feeds.head_index, target_ids].astype(np.float32)

    def logits(self, feeds):
        return self.log_p[feeds.head_index].astype(np.float32)

    def close(self):
        """Nothing is held."""


def independent(seed: int) -> Independent:
    logits = np.random.default_rng(seed).standard_normal((96, V))
    return Independent(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))


def test_independent_positions_give_their_exact_likelihood() -> None:
    """There the bound is tight: -log2 p is the sum over positions."""
    *_, settings = probes(shifted=False)
    session, answer = independent(0), ids_of("abcd")
    found = score(session, settings, ids_of("abc"), answer, samples=1000)
    exact = -sum(session.log_p[3 + i, token] for i, token in enumerate(answer)) / math.log(2)
    # The standard error of 1000 samples is 1.2 % of it.
    assert found.bits == pytest.approx(exact, rel=0.04)


@given(st.integers(1, 80), st.integers(1, 9), st.integers(1, 6))
def test_pieces_cover_every_mask_once(length: int, samples: int, batch_size: int) -> None:
    masks = [tuple(mask) for mask in stratified_masks(length, samples, random.Random(0))]
    pieces = [piece for batch in batches(masks, V, batch_size) for piece in batch]
    assert all(len(batch) <= batch_size for batch in batches(masks, V, batch_size))
    assert all(1 <= len(piece.asked) <= scoring.HEAD_ROWS for piece in pieces)
    for sample, mask in enumerate(masks):
        mine = [piece for piece in pieces if piece.sample == sample]
        assert tuple(place for piece in mine for place in piece.asked) == mask
        assert {piece.masked for piece in mine} == {mask}


def test_a_pass_holds_no_more_logits_than_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    *_, settings = probes(shifted=False)
    monkeypatch.setattr(scoring, "LOGITS_A_PASS", 50 * V)
    session = independent(1)
    score(session, settings, [], ids_of("abcdefghijklmnopqrst"), samples=20)
    assert max(session.sizes) <= 50 * V
    assert len(session.sizes) == 10


@given(st.integers(1, 12), st.integers(1, 40), st.integers(0, 99))
def test_masks_are_stratified(length: int, count: int, seed: int) -> None:
    masks = list(stratified_masks(length, count, random.Random(seed)))
    assert len(masks) == count
    sizes = Counter(len(mask) for mask in masks)
    assert set(sizes) <= set(range(1, length + 1))
    assert all(len(set(mask)) == len(mask) and set(mask) <= set(range(length)) for mask in masks)
    if count >= length:
        assert max(sizes.values()) - min(sizes[size] for size in range(1, length + 1)) <= 1


def test_few_masks_are_of_any_size() -> None:
    sizes = Counter(len(mask) for seed in range(200) for mask in stratified_masks(4, 1, random.Random(seed)))
    assert set(sizes) == {1, 2, 3, 4}
    assert min(sizes.values()) > 25


@pytest.mark.parametrize(
    ("prompt", "answer", "changes", "fault", "message"),
    [
        ([1], [], {}, UsageFault, "answer has no tokens"),
        ([1] * 90, [1] * 6, {}, UsageFault, "90 and 6 tokens, 97 with the end-of-text; the model takes 96"),
        ([1, MASK], [2], {}, UsageFault, f"holds the mask .id {MASK}."),
        ([1], [MASK], {}, UsageFault, "holds the mask"),
        ([1], [V], {}, InputRefused, f"id {V}; the model's embedding has rows 0 to {V - 1}"),
        ([-1], [2], {}, InputRefused, "id -1"),
        ([1], [2], {"samples": 0}, UsageFault, "samples is 0 .* expected 1 or more"),
        ([1], [2], {"guidance": -1.0}, UsageFault, "guidance is -1.0; expected 0 or more"),
        ([1], [2], {"guidance": math.nan}, UsageFault, "guidance is nan"),
        ([1], [2], {"batch_size": 0}, UsageFault, "batch_size 0; expected 1 or more"),
    ],
)
def test_what_cannot_be_scored(prompt, answer, changes, fault, message) -> None:
    *_, settings = probes(shifted=False)
    with pytest.raises(fault, match=message):
        score(independent(0), settings, prompt, answer, **changes)


def test_logits_that_are_not_numbers_are_not_a_score() -> None:
    *_, settings = probes(shifted=False)
    session = independent(0)
    session.log_p[5] = math.nan
    with pytest.raises(ValidationFailed, match="NaN or infinite"):
        score(session, settings, ids_of("abc"), ids_of("defg"), samples=4)


@pytest.mark.parametrize("shifted", [False, True], ids=["llada", "dream"])
def test_one_row_of_a_pass(shifted: bool) -> None:
    """A row alone has the logits that it has in its batch, banned ids and all."""
    model, *_, settings = probes(shifted=shifted)
    ids = scored_canvas(ids_of("ab"), ids_of("cdefgh"), settings)
    masks = [tuple(2 + place for place in mask) for mask in stratified_masks(6, 3, random.Random(0))]
    feeds, _ = batch_feeds(ids, next(batches(masks, V, 3)), replace(settings, vocab_size=30))
    session = EagerScore(model)
    whole = session.logits(feeds)
    rows = feeds.head_index.shape[1]
    for row, head_row in [(0, 0), (2, rows - 1)]:
        alone = row_logits(session, feeds, row, head_row)
        assert alone.shape == (V,)
        np.testing.assert_allclose(alone, whole[row, head_row], rtol=1e-5, atol=1e-5)
        assert (alone[[MASK, *range(30, V)]] < -1e8).all()
        assert EOS >= 30


@pytest.mark.parametrize("shifted", [False, True], ids=["llada", "dream"])
def test_one_row_of_a_guided_pass(shifted: bool) -> None:
    """Its best logits are those that the guided record keeps."""
    model, *_, settings = probes(shifted=shifted)
    ids = scored_canvas(ids_of("abc"), ids_of("defgh"), settings)
    masks = [tuple(3 + place for place in mask) for mask in stratified_masks(5, 3, random.Random(0))]
    plain, _ = batch_feeds(ids, next(batches(masks, V, 3)), settings)
    promptless = np.where(np.arange(plain.input_ids.shape[1]) < 3, MASK, plain.input_ids)
    feeds = replace(plain, guidance=np.array([0.0, 0.5, 2.0], np.float32), promptless_ids=promptless)
    record = EagerGuided(model, top_k=6).run(feeds)
    for row, head_row in [(0, 0), (1, 2), (2, 1)]:
        logits = row_logits(EagerScore(model), feeds, row, head_row)
        ids_kept = record.top_ids[row, head_row]
        np.testing.assert_allclose(logits[ids_kept], record.top_logits[row, head_row], rtol=1e-5, atol=1e-4)
        assert np.delete(logits, ids_kept).max() <= logits[ids_kept[-1]] + 1e-4
        assert logits[MASK] < -1e8


def test_a_closed_session_scores_nothing() -> None:
    model, *_, settings = probes(shifted=False)
    session = EagerScore(model)
    session.close()
    with pytest.raises(ValueError, match="was closed"):
        score(session, settings, [1], [2])
