"""Samples of a calibration: windows of plain text, pairs, what is left out, what is drawn, clean and noised."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from pipeline.calibration import corpus
from pipeline.calibration.corpus import MIN_TOKENS, calibration_states
from pipeline.calibration.sources import Text
from pipeline.calibration.states import States, builtin_corpus, noised_states
from pipeline.errors import InputRefused
from pipeline.models.config import ModelConfig
from pipeline.recipe import Calibration
from pipeline.tiny.tokenizer import train_tokenizer
from pipeline.tiny.train import LLADA_SPECIALS
from tests.pipeline.models.folders import make_config

WORDS = "sort 3 1 2: copy abc: 7+5=12;4+8=13;"


@cache
def trained() -> Tokenizer:
    return train_tokenizer(LLADA_SPECIALS)


@cache
def config() -> ModelConfig:
    end, mask = (trained().token_to_id(name) for name in ("<|endoftext|>", "<|mdm_mask|>"))
    return make_config("llada", embedding_size=384, vocab_size=384, eos_id=end, pad_id=end, mask_id=mask)


def encoded(text: str) -> list[int]:
    ids: list[int] = trained().encode(text, add_special_tokens=False).ids
    return ids


def made(path: Path, content: str, samples: int, **settings: Any) -> States:
    path.write_text(content)
    part = Calibration(source=f"file:{path}", samples=samples, **settings)
    return calibration_states(part, trained(), config())


def rows(states: States) -> list[list[int]]:
    return [row[:size].tolist() for row, size in zip(states.clean_ids, states.kv_len, strict=True)]


def test_the_built_in_canvases_are_the_problems_noised() -> None:
    found = calibration_states(Calibration(samples=9, length=20, seed=3), trained(), config())
    problems = builtin_corpus(9, 3, held_out=False)
    expected = noised_states(problems, trained(), config(), length=20, seed=3)
    for name in ("input_ids", "clean_ids", "kv_len", "answer", "noise", "masked"):
        assert torch.equal(getattr(found, name), getattr(expected, name))


@given(words=st.integers(1, 12), length=st.integers(8, 40), seed=st.integers(0, 9), noised=st.booleans())
def test_long_text_is_cut_into_windows(words: int, length: int, seed: int, noised: bool) -> None:
    """Every window once, all of it answer; only a rest below the least size is left out."""
    text = WORDS * words
    ids = encoded(text)
    expected = [ids[start : start + length] for start in range(0, len(ids), length)]
    expected = [window for window in expected if len(window) >= MIN_TOKENS]
    part = Calibration(
        source="file:x", samples=len(expected), length=length, seed=seed, states="noised" if noised else "clean"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "texts", lambda _: iter([Text(prompt=None, answer=text, where="x")]))
        states = calibration_states(part, trained(), config())
    assert sorted(rows(states)) == sorted(expected)
    assert torch.equal(states.answer.sum(1), states.kv_len)
    assert torch.equal(states.input_ids == config().mask_id, states.masked)
    assert not (states.masked & ~states.answer).any()
    assert states.masked.any(1).all() if noised else not states.masked.any()
    assert noised or not states.noise.any()


def test_pairs_are_noised_in_their_answers_alone(tmp_path: Path) -> None:
    pairs = [{"prompt": f"sort {n} 1 2:", "answer": f"1 2 {n}"} for n in range(3, 9)]
    content = "\n".join(map(json.dumps, pairs))
    states = made(tmp_path / "a.jsonl", content, 6, length=64)
    expected = [[*encoded(p["prompt"]), *encoded(p["answer"]), config().eos_id] for p in pairs]
    assert sorted(rows(states)) == sorted(expected)
    assert not (states.masked & ~states.answer).any()
    assert states.masked.any(1).all()
    for row, (ids, answer) in enumerate(zip(rows(states), states.answer, strict=True)):
        start = int(answer.nonzero()[0, 0])
        assert trained().decode(ids[:start]) in {pair["prompt"] for pair in pairs}, row


def test_seeds_draw_among_the_samples(tmp_path: Path) -> None:
    lines = [f"{WORDS} line {n}" for n in range(30)]
    content, path = "\n".join(lines), tmp_path / "a.txt"
    first, again, other = (rows(made(path, content, 8, seed=seed, states="clean")) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert len({tuple(row) for row in first}) == 8
    whole = rows(made(path, content, 30, seed=1, states="clean"))
    assert sorted(whole) == sorted(encoded(line) for line in lines)
    assert whole != [encoded(line) for line in lines]  # noise goes by the order, which must not be the text's


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "", "gives 0 samples of calibration text; calibration.samples asks for 4: give more text"),
        ("a.txt", "one two\n\nx", r"gives 0 samples of .*left out: 2 with fewer than 8 tokens.*give more text"),
        ("a.txt", f"{WORDS}\nx\n", r"gives 1 samples.*1 with fewer.*pass --set calibration.samples=1, or more text"),
        (
            "a.jsonl",
            json.dumps({"prompt": WORDS * 9, "answer": "x"}),
            r"1 whose prompt fills calibration\.length 32\).* give more text",
        ),
        ("a.txt", f"{WORDS} <|mdm_mask|>", r"a\.txt line 1 holds the mask token"),
    ],
)
def test_too_little_text_is_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    with pytest.raises(InputRefused, match=message):
        made(tmp_path / name, content, 4, length=32)


def test_no_canvas_is_longer_than_the_model_takes(tmp_path: Path) -> None:
    states = made(tmp_path / "a.txt", WORDS * 40, 1, length=4096)
    assert int(states.kv_len.max()) == config().max_length
