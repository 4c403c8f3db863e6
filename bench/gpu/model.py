"""What both models have in common: ids in, the record of the head rows out, keys and values in a cache.

Shape letters: Q query rows, R head rows, S cache slots, D hidden, V vocabulary, J key/value heads, C channels a head.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.gpu.attention import place, rotary_table
from bench.gpu.machine import Machine
from bench.gpu.shapes import ModelShape

BANNED = -1e9


@dataclass(frozen=True)
class Recorded:
    """What the denoising loop needs of each head row."""

    ids: Tensor  # [R] the best token
    tail: Tensor  # [R] sum of exp(logit - max) over all other tokens
    neg_entropy: Tensor  # [R]


def size_bytes(tree: Any) -> int:
    """Bytes of every tensor in nested dicts and lists."""
    if isinstance(tree, Tensor):
        return tree.nbytes
    if isinstance(tree, dict):
        return sum(size_bytes(value) for value in tree.values())
    return sum(size_bytes(value) for value in tree) if isinstance(tree, list | tuple) else 0


class Model(ABC):
    """A transformer with random weights; batch 1, every slot of the cache is visible."""

    cache_type: torch.dtype

    def __init__(self, shape: ModelShape, machine: Machine) -> None:
        self.shape = shape
        self.machine = machine
        self.weights: dict[str, Any] = {}
        self.cache: list[tuple[Tensor, Tensor]] = []
        self.table = torch.empty(0)
        self.logit_bias = torch.zeros(shape.vocabulary, device=machine.device)
        self.logit_bias[shape.mask_id] = BANNED
        self._place = machine.compiled(place)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights, scales and constants."""
        return size_bytes(self.weights)

    def allocate(self, slots: int) -> None:
        """A new cache of `slots`, empty."""
        self.cache.clear()
        size = (slots, self.shape.kv_heads, self.shape.head_dim)
        for _ in range(self.shape.layers):
            keys, values = (torch.zeros(size, dtype=self.cache_type, device=self.machine.device) for _ in range(2))
            self.cache.append((keys, values))
        self.table = rotary_table(self.shape, slots, self.machine.device)

    def __call__(self, ids: Tensor, positions: Tensor, head_rows: Tensor) -> Recorded:
        """One pass over query rows ids [Q], which stand in slots positions [Q]; the record of rows head_rows [R]."""
        state = (ids == self.shape.mask_id).int()
        x = self.blocks(self.embed(ids), positions, state)
        return self.record(x[head_rows])

    def blocks(self, x: Tensor, positions: Tensor, state: Tensor) -> Tensor:
        """The residual stream [Q, D] behind the last block."""
        for layer in range(self.shape.layers):
            x = self.block(x, layer, positions, state)
        return x

    @abstractmethod
    def embed(self, ids: Tensor) -> Tensor:
        """The residual stream [Q, D] in front of the first block."""

    @abstractmethod
    def block(self, x: Tensor, layer: int, positions: Tensor, state: Tensor) -> Tensor:
        """One block; state [Q] is 1 for masked rows."""

    @abstractmethod
    def record(self, x: Tensor) -> Recorded:
        """Final norm, head and reductions of x [R, D]."""
