"""Canvases: texts with a share t ~ U(0, 1) of their answers masked, stratified over t, or as they are.

Shape letters: N samples, L sequence. Every draw is keyed by (seed, sample); of the other samples only their number
matters, which decides the stratum.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from tokenizers import Tokenizer
from torch import Tensor

from pipeline.models.config import ModelConfig
from pipeline.tiny.problems import Problem, problems


@dataclass(frozen=True, kw_only=True)
class States:
    """Canvases as a model sees them; `masked` and `answer` are boolean [N, L], `noise` [N] the masked share drawn."""

    input_ids: Tensor
    clean_ids: Tensor
    kv_len: Tensor
    answer: Tensor
    noise: Tensor
    masked: Tensor

    def batches(self, size: int) -> Iterator["States"]:
        """Consecutive batches, each cut to its longest row."""
        for start in range(0, len(self.kv_len), size):
            part = slice(start, start + size)
            length = int(self.kv_len[part].max())
            yield States(
                input_ids=self.input_ids[part, :length],
                clean_ids=self.clean_ids[part, :length],
                kv_len=self.kv_len[part],
                answer=self.answer[part, :length],
                noise=self.noise[part],
                masked=self.masked[part, :length],
            )


def builtin_corpus(count: int, seed: int, *, held_out: bool) -> list[Problem]:
    """The generated problems, `count` of them."""
    return list(islice(problems(seed, held_out=held_out), count))


@dataclass(frozen=True)
class Sample:
    """Tokens of one canvas; those from `start` on are its answer."""

    ids: list[int]
    start: int

    def cut(self, length: int) -> "Sample":
        """The first `length` tokens, of which the last is answer in any case."""
        return Sample(self.ids[:length], min(self.start, length - 1))


def encode_pair(prompt: str, answer: str, tokenizer: Tokenizer, config: ModelConfig) -> Sample:
    """Prompt, answer and end-of-text."""
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids
    return Sample([*ids, *tokenizer.encode(answer, add_special_tokens=False).ids, config.eos_id], len(ids))


def noised_states(
    corpus: list[Problem], tokenizer: Tokenizer, config: ModelConfig, *, length: int, seed: int
) -> States:
    """One noised canvas a problem: prompt, answer and end-of-text, cut to `length`."""
    samples = [encode_pair(problem.prompt, problem.answer, tokenizer, config).cut(length) for problem in corpus]
    return make_states(samples, config, seed=seed, noised=True)


def make_states(samples: Sequence[Sample], config: ModelConfig, *, seed: int, noised: bool) -> States:
    """One canvas a sample, in their order; noised, at least one token of each is masked, else none is."""
    longest = max(len(sample.ids) for sample in samples)
    clean = torch.full((len(samples), longest), config.pad_id)
    answers = torch.zeros(len(samples), longest, dtype=torch.bool)
    masked = torch.zeros_like(answers)
    noise = torch.zeros(len(samples))
    # In an order of their own, so that any part of the canvases, and any batch, has all levels of noise.
    strata = random.Random(f"{seed}/strata").sample(range(len(samples)), len(samples))
    for n, sample in enumerate(samples):
        size = len(sample.ids)
        clean[n, :size] = torch.tensor(sample.ids)
        answers[n, sample.start : size] = True
        if noised:
            draw = random.Random(f"{seed}/{n}")
            noise[n] = (strata[n] + draw.random()) / len(samples)
            for position in range(sample.start, size):
                masked[n, position] = draw.random() < noise[n]
            if not masked[n].any():
                masked[n, draw.randrange(sample.start, size)] = True
    assert not noised or masked.any(1).all(), "every noised canvas has a masked token"
    return States(
        input_ids=clean.masked_fill(masked, config.mask_id),
        clean_ids=clean,
        kv_len=torch.tensor([len(sample.ids) for sample in samples]),
        answer=answers,
        noise=noise,
        masked=masked,
    )
