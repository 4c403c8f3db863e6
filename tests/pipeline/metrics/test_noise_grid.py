"""Canvases of the grid: what is masked, what a draw depends on, and which row of a model predicts which position."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.calibration.states import Sample
from pipeline.metrics.noise_grid import masked_rows, noise_grid
from tests.pipeline.metrics.probes import probes, samples
from tests.pipeline.random_models import MASK

SETTINGS = probes(shifted=False)[-1]


@given(st.integers(1, 40), st.integers(0, 9), st.integers(1, 12), st.integers(0, 3))
def test_every_level_masks_its_share_of_the_answer(length, prompt, levels, seed):
    grid = noise_grid([Sample([1] * (prompt + length), prompt)], SETTINGS, levels=levels, seed=seed)
    states = grid.states
    assert grid.levels == tuple(i / levels for i in range(1, levels + 1))
    assert states.masked.sum(1).tolist() == [max(1, round(level * length)) for level in grid.levels]
    assert not states.masked[:, :prompt].any()
    assert states.masked[-1, prompt:].all()
    assert torch.equal(states.input_ids == MASK, states.masked)
    assert (states.clean_ids == 1).all()
    assert torch.equal(states.noise, states.masked.sum(1) / length)
    assert grid.tokens == int(states.masked.sum())


def test_masks_of_a_sample_depend_on_no_other():
    several = samples(5)
    grid = noise_grid(several, SETTINGS, levels=4, seed=1)
    assert grid.count == 5
    changed = [*samples(3, seed=9), *several[3:]]
    other = noise_grid(changed, SETTINGS, levels=4, seed=1)
    length = len(several[3].ids)
    for row in range(12, 16):
        assert torch.equal(grid.states.input_ids[row, :length], other.states.input_ids[row, :length])
    assert not torch.equal(grid.states.masked, noise_grid(several, SETTINGS, levels=4, seed=2).states.masked)
    twins = noise_grid([Sample([1] * 40, 2)] * 2, SETTINGS, levels=2).states.masked
    assert not torch.equal(twins[0], twins[2])


def test_samples_are_taken_until_there_are_enough():
    endless = iter(samples(50))
    grid = noise_grid(endless, SETTINGS, tokens=100)
    assert grid.tokens >= 100
    assert noise_grid(samples(grid.count - 1), SETTINGS).tokens < 100
    assert len(list(endless)) == 50 - grid.count  # no more were read than are used
    with pytest.raises(ValueError, match="expected 1000 or more"):
        noise_grid(samples(3), SETTINGS, tokens=1000)
    with pytest.raises(ValueError, match="0 masked tokens"):
        noise_grid([], SETTINGS)


def test_long_samples_are_cut_to_what_the_model_takes():
    grid = noise_grid([Sample([1] * 500, 400)], SETTINGS)
    assert grid.states.input_ids.shape == (8, SETTINGS.max_length)
    assert grid.states.masked.sum(1).tolist() == [1] * 8


@pytest.mark.parametrize("shifted", [False, True])
def test_every_masked_position_is_asked_once(shifted):
    settings = probes(shifted=shifted)[-1]
    grid = noise_grid(samples(5), settings, levels=3)
    found = []
    for rows in masked_rows(grid.states, settings, 4):
        positions = torch.from_numpy(rows.feeds.head_index)[rows.counts] + int(shifted)
        found += zip(rows.canvases.tolist(), positions.tolist(), rows.targets.tolist(), strict=True)
    masked = grid.states.masked.nonzero().tolist()
    assert sorted(found) == [(n, i, int(grid.states.clean_ids[n, i])) for n, i in masked]
