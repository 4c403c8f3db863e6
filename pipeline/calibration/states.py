"""Noised canvases: problems with a share t ~ U(0, 1) of their answers masked, stratified over t.

Shape letters: N samples, L sequence. Every draw is keyed by (seed, sample); of the other samples only their number
matters, which decides the stratum.
"""

import random
from collections.abc import Iterator
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


def noised_states(
    corpus: list[Problem], tokenizer: Tokenizer, config: ModelConfig, *, length: int, seed: int
) -> States:
    """One canvas a problem: prompt, answer and end-of-text, cut to `length`; at least one token is masked."""
    rows = []
    for problem in corpus:
        prompt = tokenizer.encode(problem.prompt, add_special_tokens=False).ids
        answer = [*tokenizer.encode(problem.answer, add_special_tokens=False).ids, config.eos_id]
        rows.append(((prompt + answer)[:length], min(len(prompt), length - 1)))
    longest = max(len(ids) for ids, _ in rows)
    clean = torch.full((len(rows), longest), config.pad_id)
    answers = torch.zeros(len(rows), longest, dtype=torch.bool)
    masked = torch.zeros_like(answers)
    noise = torch.zeros(len(rows))
    for n, (ids, start) in enumerate(rows):
        draw = random.Random(f"{seed}/{n}")
        clean[n, : len(ids)] = torch.tensor(ids)
        answers[n, start : len(ids)] = True
        noise[n] = (n + draw.random()) / len(rows)
        for position in range(start, len(ids)):
            masked[n, position] = draw.random() < noise[n]
        if not masked[n].any():
            masked[n, draw.randrange(start, len(ids))] = True
    return States(
        input_ids=clean.masked_fill(masked, config.mask_id),
        clean_ids=clean,
        kv_len=torch.tensor([len(ids) for ids, _ in rows]),
        answer=answers,
        noise=noise,
        masked=masked,
    )
