"""Keyed generators: the same key the same draw, another key another one, whatever was drawn before."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from passes.solvers.draws import generator

KEYS = st.tuples(st.integers(0, 2**40), st.lists(st.text("ab.0", max_size=3), max_size=3))


def drawn(seed: int, key: list[str]) -> list[float]:
    return torch.rand(4, generator=generator(seed, *key)).tolist()


@given(KEYS, KEYS)
def test_draws_differ_exactly_where_keys_do(one: tuple[int, list[str]], other: tuple[int, list[str]]) -> None:
    assert (drawn(*one) == drawn(*other)) == (one == other)


def test_the_draw_is_the_same_in_every_process_and_release() -> None:
    assert generator(0, "blocks.0").initial_seed() == 1152236296429187678
