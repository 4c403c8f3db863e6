"""Inputs of the proof: every masked position with its own target, and canvases of every shape."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.calibration.states import States
from pipeline.models.config import ModelConfig
from pipeline.runner.loop import BANNED, logit_bias
from pipeline.runner.settings import Settings
from pipeline.validation.feeds import SWEEP_NOISE, is_banned, scored_batches, sweep, unbanned
from tests.pipeline.models.folders import make_config


def states_of(config: ModelConfig, masks: list[list[bool]]) -> States:
    """Canvases with these masks; row lengths differ, every id is its own."""
    width = max(map(len, masks))
    masked = torch.tensor([[*mask, *[False] * (width - len(mask))] for mask in masks])
    clean = torch.arange(masked.numel()).reshape(masked.shape) % 80
    return States(
        input_ids=clean.masked_fill(masked, config.mask_id),
        clean_ids=clean,
        kv_len=torch.tensor([len(mask) for mask in masks]),
        answer=masked,
        noise=torch.zeros(len(masks)),
        masked=masked,
    )


ROW = st.lists(st.booleans(), min_size=1, max_size=9).map(lambda row: [False, *row, True])


@given(masks=st.lists(ROW, min_size=1, max_size=7), size=st.integers(1, 8), family=st.sampled_from(["llada", "dream"]))
def test_every_masked_position_is_scored_once(masks: list[list[bool]], size: int, family: str) -> None:
    config = make_config(family)
    states = states_of(config, masks)
    found: list[tuple[int, int, int]] = []
    start = 0
    for batch in scored_batches(Settings.of_model(config), states, size):
        feeds = batch.feeds
        assert batch.targets.shape == batch.counts.shape == feeds.head_index.shape
        assert feeds.input_ids.shape == feeds.position_ids.shape
        assert (feeds.position_ids == np.arange(feeds.input_ids.shape[1])).all()
        for row, column in zip(*np.nonzero(batch.counts), strict=True):
            # Dream's row i predicts position i + 1.
            position = int(feeds.head_index[row, column]) + (family == "dream")
            assert feeds.input_ids[row, position] == config.mask_id
            found.append((start + int(row), position, int(batch.targets[row, column])))
        assert (feeds.head_index >= 0).all()
        assert (feeds.head_index < feeds.input_ids.shape[1]).all()
        start += len(feeds.kv_len)
    expected = [(row, place, int(states.clean_ids[row, place])) for row, place in states.masked.nonzero().tolist()]
    assert sorted(found) == expected


def test_what_can_never_be_meant_is_banned() -> None:
    """As in the runner: the mask, and every id from the tokenizer's last on (here 93) to the end of the rows."""
    settings = replace(Settings.of_model(make_config("llada")), vocab_size=94)
    for one in sweep(settings, 0):
        assert (one.logit_bias == logit_bias(settings)).all()
        assert one.input_ids.max() < 94
        assert set(np.flatnonzero(one.logit_bias)) == {settings.mask_id, *range(94, 128)}
    assert unbanned(settings) == 93


def test_a_banned_logit_is_told_from_every_other() -> None:
    logits = np.array([BANNED, BANNED + 3e4, BANNED - 3e4, -3e4, 3e4, 0.0, np.nan, -np.inf], np.float32)
    assert is_banned(logits).tolist() == [True, True, True, False, False, False, False, True]


@pytest.mark.parametrize(("limit", "lengths"), [(256, [1, 2, 7, 33, 128]), (20, [1, 2, 7, 20]), (1, [1])])
def test_the_sweep_covers_every_shape_and_noise(limit: int, lengths: list[int]) -> None:
    config = Settings.of_model(make_config("llada", max_length=limit))
    feeds = list(sweep(config, 0))
    shapes = [one.input_ids.shape for one in feeds]
    assert shapes == [(batch, length) for batch in (1, 3) for length in lengths for _ in SWEEP_NOISE]
    assert SWEEP_NOISE[0] == 0.0
    assert SWEEP_NOISE[-1] == 1.0
    for number, one in enumerate(feeds):
        noise = SWEEP_NOISE[number % len(SWEEP_NOISE)]
        masked = (one.input_ids == config.mask_id).mean()
        assert masked == 1.0 if noise == 1.0 else masked < 1.0 or one.input_ids.size < 20
        assert noise > 0 or masked <= 0.2
        assert ((one.kv_len >= 1) & (one.kv_len <= one.input_ids.shape[1])).all()
        assert one.kv_len[0] == one.input_ids.shape[1]
        assert (one.head_index < one.kv_len[:, None]).all()
        assert one.head_index.shape == one.input_ids.shape
    ragged = [one for one in feeds if (one.kv_len < one.input_ids.shape[1]).any()]
    assert bool(ragged) == (limit > 1)


def test_equal_seeds_give_equal_sweeps() -> None:
    config = Settings.of_model(make_config("dream"))
    pairs = [[one.input_ids.tobytes() for one in sweep(config, seed)] for seed in (0, 0, 1)]
    assert pairs[0] == pairs[1]
    assert pairs[0] != pairs[2]
