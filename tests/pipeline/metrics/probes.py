"""Tiny random models as probes, one a disturbed copy of the other, and samples for them."""

import random
from dataclasses import replace

import torch

from pipeline.calibration.states import Sample
from pipeline.metrics.probe import Probe, transformer_probe
from pipeline.models.transformer import Transformer
from pipeline.runner import Settings
from tests.pipeline.random_models import EOS, tiny


def disturbed(model: Transformer, share: float = 0.05) -> Transformer:
    """The same model with noise on every matrix, as quantisation would put there."""
    copy = tiny(shifted=model.config.shifted_logits)
    draw = torch.Generator().manual_seed(1)
    for weight in copy.parameters():
        if weight.dim() == 2:
            weight.data += share * weight.data.std() * torch.randn(weight.shape, generator=draw)
    return copy


def probes(*, shifted: bool) -> tuple[Transformer, Probe, Transformer, Probe, Settings]:
    """Reference and candidate, each as module and as probe."""
    model = tiny(shifted=shifted)
    other = disturbed(model)
    for each in (model, other):  # or every hidden state would be of one length
        each.norm.weight.data = torch.linspace(0.5, 2.0, model.config.hidden_size)
    # Fewer ids than the head has rows, so that some are banned beside the mask.
    settings = replace(Settings.of_model(model.config), vocab_size=39)
    return model, transformer_probe(model), other, transformer_probe(other), settings


def samples(count: int, seed: int = 0) -> list[Sample]:
    """Prompts of 1 to 6 letters, answers of 1 to 9 and an end-of-text."""
    draw = random.Random(seed)
    made = []
    for _ in range(count):
        start = draw.randint(1, 6)
        ids = [draw.randrange(36) for _ in range(start + draw.randint(1, 9))]
        made.append(Sample([*ids, EOS], start))
    return made
