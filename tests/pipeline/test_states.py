"""Noised canvases: what is masked, drawn by sample, stratified over the noise."""

from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from pipeline.calibration.states import States, builtin_corpus, noised_states
from pipeline.models.config import ModelConfig
from pipeline.tiny.problems import Problem, is_held_out
from pipeline.tiny.reference import LLADA_SPECIALS
from pipeline.tiny.tokenizer import train_tokenizer
from tests.pipeline.models.folders import make_config


@cache
def trained() -> Tokenizer:
    return train_tokenizer(LLADA_SPECIALS)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return trained()


@pytest.fixture(scope="module")
def config(tokenizer: Tokenizer) -> ModelConfig:
    end = tokenizer.token_to_id("<|endoftext|>")
    mask = tokenizer.token_to_id("<|mdm_mask|>")
    return make_config("llada", embedding_size=384, vocab_size=384, eos_id=end, pad_id=end, mask_id=mask)


def made(tokenizer: Tokenizer, config: ModelConfig, count: int, *, length: int = 64, seed: int = 0) -> States:
    return noised_states(builtin_corpus(count, seed, held_out=False), tokenizer, config, length=length, seed=seed)


def test_only_answers_are_masked_and_all_else_is_the_text(tokenizer: Tokenizer, config: ModelConfig) -> None:
    corpus = builtin_corpus(24, 0, held_out=False)
    states = noised_states(corpus, tokenizer, config, length=200, seed=0)
    for n, problem in enumerate(corpus):
        prompt = tokenizer.encode(problem.prompt, add_special_tokens=False).ids
        answer = [*tokenizer.encode(problem.answer, add_special_tokens=False).ids, config.eos_id]
        length = int(states.kv_len[n])
        assert states.clean_ids[n, :length].tolist() == prompt + answer
        assert states.answer[n].nonzero()[:, 0].tolist() == list(range(len(prompt), length))
        assert (states.clean_ids[n, length:] == config.pad_id).all()
    assert not (states.masked & ~states.answer).any()
    assert torch.equal(states.input_ids == config.mask_id, states.masked)
    assert torch.equal(states.input_ids[~states.masked], states.clean_ids[~states.masked])
    assert states.masked.any(1).all()


def test_noise_is_stratified_and_is_the_share_that_is_masked(tokenizer: Tokenizer, config: ModelConfig) -> None:
    count = 600
    states = made(tokenizer, config, count)
    strata = (states.noise * count).long()
    assert sorted(strata.tolist()) == list(range(count))
    expected = (states.noise[:, None] * states.answer).sum(1)
    deviation = (states.masked.sum(1) - expected).sum() / expected.sum()
    assert abs(float(deviation)) <= 0.02  # 12,000 draws, and at least one of a row


def test_any_part_has_all_levels_of_noise(tokenizer: Tokenizer, config: ModelConfig) -> None:
    """What takes a prefix, or learns in order, sees no other noise than the rest: a tenth is uniform to 0.25."""
    noise = made(tokenizer, config, 600).noise
    for part in noise.split(60):
        levels = (torch.arange(60) + 0.5) / 60
        assert float((part.sort().values - levels).abs().max()) <= 0.25  # exceeded by 0.1 % of random parts


def test_equal_seeds_give_equal_states(tokenizer: Tokenizer, config: ModelConfig) -> None:
    first, again, other = (made(tokenizer, config, 16, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first.input_ids, again.input_ids)
    assert torch.equal(first.noise, again.noise)
    assert not torch.equal(first.noise, other.noise)


def test_a_sample_draws_for_itself(tokenizer: Tokenizer, config: ModelConfig) -> None:
    """Another text before it changes nothing in a sample's mask."""
    corpus = builtin_corpus(6, 0, held_out=False)
    states = noised_states(corpus, tokenizer, config, length=64, seed=0)
    changed = noised_states([Problem("x", "copy a:", "a"), *corpus[1:]], tokenizer, config, length=64, seed=0)
    width = min(states.masked.shape[1], changed.masked.shape[1])
    assert torch.equal(states.masked[1:, :width], changed.masked[1:, :width])


def test_calibration_and_measurement_share_no_problem() -> None:
    seen = {problem.prompt for problem in builtin_corpus(300, 0, held_out=False)}
    held = {problem.prompt for problem in builtin_corpus(60, 0, held_out=True)}
    assert not seen & held
    assert all(map(is_held_out, held))
    assert not any(map(is_held_out, seen))


@given(length=st.integers(2, 20), text=st.text(max_size=30), answer=st.text(max_size=30), seed=st.integers(0, 99))
def test_any_text_is_cut_to_the_length(length: int, text: str, answer: str, seed: int) -> None:
    limits = make_config("llada", embedding_size=384, vocab_size=384, eos_id=344, pad_id=344, mask_id=345)
    states = noised_states([Problem("x", text, answer)], trained(), limits, length=length, seed=seed)
    assert 1 <= int(states.kv_len[0]) <= length
    assert states.masked.any()
    assert not (states.masked & ~states.answer).any()
    assert int(states.answer.nonzero()[-1, 1]) == int(states.kv_len[0]) - 1


@pytest.mark.parametrize("size", [1, 4, 7, 100])
def test_batches_are_cut_to_their_longest_row(tokenizer: Tokenizer, config: ModelConfig, size: int) -> None:
    states = made(tokenizer, config, 10)
    batches = list(states.batches(size))
    assert [len(batch.kv_len) for batch in batches] == [min(size, 10 - start) for start in range(0, 10, size)]
    start = 0
    for batch in batches:
        rows, width = batch.input_ids.shape
        assert width == int(batch.kv_len.max())
        for name in ("input_ids", "clean_ids", "answer", "masked"):
            assert torch.equal(getattr(batch, name), getattr(states, name)[start : start + rows, :width])
        assert torch.equal(batch.noise, states.noise[start : start + rows])
        start += rows
