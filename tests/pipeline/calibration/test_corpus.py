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
from pipeline.tiny.reference import LLADA_SPECIALS
from pipeline.tiny.tokenizer import train_tokenizer
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


PARAGRAPHS = st.lists(st.tuples(st.sampled_from([None, None, "sort 2 1:"]), st.integers(0, 3)), min_size=1, max_size=8)


@given(paragraphs=PARAGRAPHS, length=st.integers(8, 64))
def test_texts_without_prompts_are_joined(paragraphs: list[tuple[str | None, int]], length: int) -> None:
    """In their order, end-of-text between, as far as no pair parts them; pairs stay alone."""
    found = [Text(prompt=p, answer=f"{n} {WORDS}" * size, where="x") for n, (p, size) in enumerate(paragraphs)]
    expected: list[list[int]] = []
    runs: list[list[list[int]]] = [[]]
    for text in found:
        if text.prompt is not None:
            expected.append([*encoded(text.prompt), *encoded(text.answer), config().eos_id][:length])
            runs.append([])
        elif text.answer:
            runs[-1].append(encoded(text.answer))
    for run in runs:
        ids = [token for one in run for token in (config().eos_id, *one)][1:]
        windows = [ids[start : start + length] for start in range(0, len(ids), length)]
        expected += [window for window in windows if len(window) >= MIN_TOKENS]
    prompt = len(encoded("sort 2 1:"))
    expected = [row for row in expected if prompt < length or row[:prompt] != encoded("sort 2 1:")[:length]]
    if not expected:
        return
    part = Calibration(source="file:x", samples=len(expected), length=length)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "texts", lambda _: iter(found))
        assert sorted(rows(calibration_states(part, trained(), config()))) == sorted(expected)


def test_paragraphs_fill_long_windows(tmp_path: Path) -> None:
    """Each of some 40 tokens, as in WikiText, where only the last window may be short."""
    content = "\n\n".join(f"= {n} =\n\n{WORDS} paragraph {n}" for n in range(90))
    long = ModelConfig(**{**vars(config()), "max_length": 1024})
    path = tmp_path / "a.txt"
    path.write_text(content)
    part = Calibration(source=f"file:{path}", samples=3, length=1024, states="clean")
    assert sorted(calibration_states(part, trained(), long).kv_len.tolist())[1:] == [1024, 1024]


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
    pairs = [{"prompt": f"{WORDS} line", "answer": f" {n}"} for n in range(30)]
    content, path = "\n".join(map(json.dumps, pairs)), tmp_path / "a.jsonl"
    first, again, other = (rows(made(path, content, 8, seed=seed, states="clean")) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert len({tuple(row) for row in first}) == 8
    whole = rows(made(path, content, 30, seed=1, states="clean"))
    in_order = [[*encoded(pair["prompt"]), *encoded(pair["answer"]), config().eos_id] for pair in pairs]
    assert sorted(whole) == sorted(in_order)
    assert whole != in_order  # noise goes by the order, which must not be the text's


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "", "gives 0 samples of calibration text; calibration.samples asks for 4: give more text"),
        ("a.txt", "one\n\nx", r"gives 0 samples of .*left out: 1 with fewer than 8 tokens\).*for 4: give more text$"),
        (
            "a.txt",
            f"{WORDS}\nx\n",
            r"gives 1 samples.*for 4: pass --set calibration.samples=1, or .* smaller calibration.length, or give more",
        ),
        (
            "a.jsonl",
            json.dumps({"prompt": WORDS * 9, "answer": "x"}),
            r"1 whose prompt fills calibration\.length 32\).* give more text",
        ),
        ("a.txt", f"{WORDS}\n<|mdm_mask|>\n{WORDS * 9}", r"a\.txt line 2 holds the mask token"),
        ("a.jsonl", json.dumps({"prompt": "<|mdm_mask|>", "answer": "x"}), r"a\.jsonl line 1 holds the mask token"),
    ],
)
def test_too_little_text_is_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    with pytest.raises(InputRefused, match=message):
        made(tmp_path / name, content, 4, length=32)


def test_no_canvas_is_longer_than_the_model_takes(tmp_path: Path) -> None:
    states = made(tmp_path / "a.txt", WORDS * 40, 1, length=4096)
    assert int(states.kv_len.max()) == config().max_length
