"""Random draws of the passes, each under a key of its own: what is drawn does not depend on what was drawn before."""

import hashlib

import torch


def generator(seed: int, *key: str) -> torch.Generator:
    """A generator of its own for (`seed`, `key`), seeded by their SHA-256, on the CPU."""
    digest = hashlib.sha256("\0".join((str(seed), *key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
