"""The canvases of a calibration: texts of its source, encoded, cut, drawn by its seed and noised.

Texts come in the order of their source; which of them are taken, and where the noise is, is keyed by the seed.
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

MIN_TOKENS = 8  # a heading says little of what activations look like


@dataclass
class Pool:
    """Samples to draw from, and how many texts gave none."""

    samples: list[Sample] = field(default_factory=list)
    too_short: int = 0
    too_long: int = 0

    def add(self, text: Text, tokenizer: Tokenizer, config: ModelConfig, length: int) -> None:
        """A pair is one sample, if its prompt leaves room; other text is cut into windows of `length` tokens."""
        if text.prompt is not None:
            sample = encode_pair(text.prompt, text.answer, tokenizer, config)
            if sample.start >= length:
                self.too_long += 1
            else:
                self._keep(Sample(sample.ids[:length], sample.start), text, config)
            return
        ids = tokenizer.encode(text.answer, add_special_tokens=False).ids
        windows = [ids[start : start + length] for start in range(0, len(ids), length)]
        kept = [window for window in windows if len(window) >= min(MIN_TOKENS, length)]
        self.too_short += not kept
        for window in kept:
            self._keep(Sample(window, 0), text, config)

    def _keep(self, sample: Sample, text: Text, config: ModelConfig) -> None:
        if config.mask_id in sample.ids:
            raise InputRefused(f"{text.where} holds the mask token of the model; calibration text must not: remove it")
        self.samples.append(sample)


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
    pool = Pool()
    for text in texts(part.source):
        pool.add(text, tokenizer, config, length)
    found = len(pool.samples)
    if found < part.samples:
        why = [f"{pool.too_short} with fewer than {MIN_TOKENS} tokens"] if pool.too_short else []
        why += [f"{pool.too_long} whose prompt fills calibration.length {length}"] if pool.too_long else []
        left = f" (left out: {', '.join(why)})" if why else ""
        mend = f"pass --set calibration.samples={found}, or more text" if found else "give more text"
        raise InputRefused(
            f"{part.source} gives {found} samples of calibration text{left}; calibration.samples asks for "
            f"{part.samples}: {mend}"
        )
    chosen = random.Random(f"{part.seed}/samples").sample(range(found), part.samples)
    return [pool.samples[index] for index in chosen]
