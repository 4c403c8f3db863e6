"""Moments equal numpy's, however the rows come in, and survive a file."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from passes.stats import STATES, Moments, Stats

K = 5


def rows_of(seed: int, count: int) -> np.ndarray:
    draw = np.random.default_rng(seed)
    return (draw.standard_normal((count, K)) * 10.0 ** draw.integers(-3, 4, K)).astype(np.float32)


def assert_moments(found: Moments, rows: np.ndarray) -> None:
    """Sums of n float64 numbers in any order differ by n roundings of the sum of magnitudes."""
    wide = rows.astype(np.float64)
    slack = len(rows) * 2.0**-52
    assert found.count == len(rows)
    assert np.array_equal(found.amax.numpy(), np.abs(wide).max(0))
    assert (np.abs(found.total.numpy() - wide.sum(0)) <= slack * np.abs(wide).sum(0)).all()
    assert (np.abs(found.squares.numpy() - (wide**2).sum(0)) <= slack * (wide**2).sum(0)).all()
    assert {found.total.dtype, found.squares.dtype, found.amax.dtype} == {torch.float64}


@given(st.integers(0, 2**32 - 1), st.lists(st.integers(0, 7), min_size=1, max_size=5).filter(any))
def test_moments_of_chunks_are_those_of_the_whole(seed: int, sizes: list[int]) -> None:
    rows = rows_of(seed, sum(sizes))
    stats = Stats(num_buckets=4)
    for chunk in np.split(rows, np.cumsum(sizes)[:-1]):
        stats.add("head", "masked", 2, torch.from_numpy(chunk))
    assert list(stats.table) == [("head", "masked", 2)]
    assert_moments(stats.table["head", "masked", 2], rows)


def test_keys_are_kept_apart() -> None:
    stats = Stats(num_buckets=2)
    given_rows = {}
    for seed, key in enumerate((site, state, bucket) for site in "ab" for state in STATES for bucket in range(2)):
        given_rows[key] = rows_of(seed, 3 + seed)
        stats.add(*key, torch.from_numpy(given_rows[key]))
    assert set(stats.table) == set(given_rows)
    for key, rows in given_rows.items():
        assert_moments(stats.table[key], rows)


def test_no_rows_leave_no_entry() -> None:
    stats = Stats(num_buckets=1)
    stats.add("head", "masked", 0, torch.empty(0, K))
    assert stats.table == {}
    assert stats.tensors() == {}


def test_half_rows_are_summed_in_float64() -> None:
    stats = Stats(num_buckets=1)
    rows = torch.full((4096, 1), 3.0, dtype=torch.float16)
    rows[0] = 2.0**-10
    stats.add("head", "masked", 0, rows)
    assert stats.table["head", "masked", 0].total.item() == 3.0 * 4095 + 2.0**-10


@pytest.mark.parametrize("order", [1, -1])
def test_round_trip_through_a_file(tmp_path: Path, order: int) -> None:
    stats = Stats(num_buckets=3)
    keys = [("blocks.0.attn.o_proj", "masked", 2), ("head", "unmasked", 0), ("head", "masked", 1)]
    for seed, key in enumerate(keys[::order]):
        stats.add(*key, torch.from_numpy(rows_of(seed, 4)))
    flat = stats.tensors()
    prefixes = [name.removesuffix("/count") for name in flat if name.endswith("/count")]
    assert prefixes == ["blocks.0.attn.o_proj/masked/2", "head/masked/1", "head/unmasked/0"]  # whatever came first
    save_file(flat, tmp_path / "stats.safetensors")
    again = Stats.from_tensors(load_file(tmp_path / "stats.safetensors"), num_buckets=3)
    assert again.num_buckets == 3
    assert set(again.table) == set(keys)
    for key, moments in stats.table.items():
        found = again.table[key]
        assert found.count == moments.count
        for field in ("total", "squares", "amax"):
            assert torch.equal(getattr(found, field), getattr(moments, field))


def test_a_reread_table_goes_on_counting() -> None:
    rows = rows_of(0, 9)
    stats = Stats(num_buckets=1)
    stats.add("head", "masked", 0, torch.from_numpy(rows[:4]))
    again = Stats.from_tensors(stats.tensors(), num_buckets=1)
    again.add("head", "masked", 0, torch.from_numpy(rows[4:]))
    assert_moments(again.table["head", "masked", 0], rows)
    assert stats.table["head", "masked", 0].count == 4
