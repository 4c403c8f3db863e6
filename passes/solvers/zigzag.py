"""Deal channels out to blocks so that each block gets its share of the large ones. K channels, c channels a block."""

from torch import Tensor


def zigzag(peaks: Tensor, block: int) -> Tensor:
    """Order int64 [K] of channels, block after block, by `peaks` [K]: the largest to block 0, 1, ..., then back.

    DuQuant, arXiv 2406.01721, section 3.2. Equal peaks keep their order. `block` divides K.
    """
    num_blocks = len(peaks) // block
    rounds = peaks.argsort(descending=True, stable=True).reshape(block, num_blocks)
    rounds[1::2] = rounds[1::2].flip(1)
    return rounds.T.flatten()
