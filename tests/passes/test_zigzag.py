"""Zigzag against dealing the channels out one by one."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from passes.solvers.zigzag import zigzag


def textbook(peaks: list[float], block: int) -> list[int]:
    hands: list[list[int]] = [[] for _ in range(len(peaks) // block)]
    turn, step = 0, 1
    for channel in sorted(range(len(peaks)), key=lambda k: (-peaks[k], k)):
        hands[turn].append(channel)
        turn += step
        if turn in (-1, len(hands)):  # the last one of a round is the first one of the next
            step = -step
            turn += step
    return [channel for hand in hands for channel in hand]


@given(st.data())
def test_equals_dealing_one_by_one(data: st.DataObject) -> None:
    block, num_blocks = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6))
    peaks = data.draw(st.lists(st.integers(0, 9), min_size=block * num_blocks, max_size=block * num_blocks))
    assert zigzag(torch.tensor(peaks, dtype=torch.float32), block).tolist() == textbook(list(map(float, peaks)), block)


def test_blocks_share_the_large_channels() -> None:
    order = zigzag(torch.tensor([8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]), 4)
    assert order.tolist() == [0, 3, 4, 7, 1, 2, 5, 6]  # 8 + 5 + 4 + 1 = 7 + 6 + 3 + 2
