"""The canvases of a calibration: texts of its source, encoded, joined, cut, drawn by its seed and noised.

Texts come in the order of their source; which samples of them are taken, and where the noise is, is keyed by the seed.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from pipeline.calibration.sources import Text, texts
from pipeline.calibration.states import Sample, States, builtin_corpus, encode_pair, make_states
from pipeline.errors import InputRefused
from pipeline.models.config import ModelConfig

if TYPE_CHECKING:
    from pipeline.recipe import Calibration

MIN_TOKENS = 8  # fewer say little of what activations look like


@dataclass
class Pool:
    """Samples of at most `length` tokens to draw from, and how much text gave none; `cut` after the last text."""

    tokenizer: Tokenizer
    config: ModelConfig
    length: int
    samples: list[Sample] = field(default_factory=list)
    too_short: int = 0
    too_long: int = 0
    _joined: list[int] = field(default_factory=list)

    def add(self, text: Text) -> None:
        """A pair is one sample, if its prompt leaves room; other text is joined to the text right before it."""
        if text.prompt is not None:
            self.cut()
            sample = encode_pair(text.prompt, text.answer, self.tokenizer, self.config)
            if sample.start >= self.length:
                self.too_long += 1
            else:
                self.samples.append(Sample(self._checked(sample.ids[: self.length], text), sample.start))
            return
        ids = self._checked(self.tokenizer.encode(text.answer, add_special_tokens=False).ids, text)
        if ids:
            self._joined += [self.config.eos_id, *ids] if self._joined else ids

    def cut(self) -> None:
        """What was joined becomes windows of `length` tokens, the rest one window if it is long enough."""
        for start in range(0, len(self._joined), self.length):
            window = self._joined[start : start + self.length]
            if len(window) >= min(MIN_TOKENS, self.length):
                self.samples.append(Sample(window, 0))
            else:
                self.too_short += 1
        self._joined = []

    def _checked(self, ids: list[int], text: Text) -> list[int]:
        if self.config.mask_id in ids:
            raise InputRefused(f"{text.where} holds the mask token of the model; calibration text must not: remove it")
        return ids


def calibration_states(part: Calibration, tokenizer: Tokenizer, config: ModelConfig) -> States:
    """`part.samples` canvases; raises InputRefused where the source has fewer, EnvironmentFault where it is not had."""
    length = min(part.length, config.max_length)
    if part.source == "builtin":  # endless, and short: each problem is a sample
        corpus = builtin_corpus(part.samples, part.seed, held_out=False)
        samples = [encode_pair(problem.prompt, problem.answer, tokenizer, config).cut(length) for problem in corpus]
    else:
        samples = _drawn(part, tokenizer, config, length)
    return make_states(samples, config, seed=part.seed, noised=part.states == "noised")


def _drawn(part: Calibration, tokenizer: Tokenizer, config: ModelConfig, length: int) -> list[Sample]:
    pool = Pool(tokenizer, config, length)
    for text in texts(part.source):
        pool.add(text)
    pool.cut()
    found = len(pool.samples)
    if found < part.samples:
        why = [f"{pool.too_short} with fewer than {MIN_TOKENS} tokens"] if pool.too_short else []
        why += [f"{pool.too_long} whose prompt fills calibration.length {length}"] if pool.too_long else []
        left = f" (left out: {', '.join(why)})" if why else ""
        mend = "give more text"
        if found:
            mend = f"pass --set calibration.samples={found}, or for plain text a smaller calibration.length, or {mend}"
        raise InputRefused(
            f"{part.source} gives {found} samples of calibration text{left}; calibration.samples asks for "
            f"{part.samples}: {mend}"
        )
    chosen = random.Random(f"{part.seed}/samples").sample(range(found), part.samples)
    return [pool.samples[index] for index in chosen]
