"""Float graphs of two tiny models with weights, captured once; every test edits a copy of its own."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from tests.passes.sketch import copy_of

Whole = Callable[[str], GraphModule]

ODD = {"hidden_size": 33, "intermediate_size": 45, "num_heads": 9, "num_kv_heads": 3, "head_dim": 6}


def random_weight(name: str, like: Tensor) -> Tensor:
    """Norms near one, rows of matrices of ordinary size."""
    if name.endswith("norm.weight"):
        return torch.rand(like.shape) + 0.5
    return torch.randn(like.shape) / (like.shape[-1] ** 0.5 if name.endswith("proj.weight") else 2)


@pytest.fixture(scope="session")
def whole() -> Whole:
    """`whole("llada")`: key heads = query heads, no biases; `whole("dream")`: fewer, biases, logits an output too.

    `whole("odd")` is a dream with no power of two and no multiple of four among its sizes.
    """
    from passes.graph import attributes
    from pipeline.capture import capture_whole, constants, materialise
    from tests.pipeline.random_models import tiny

    made: dict[str, GraphModule] = {}

    def get(family: str) -> GraphModule:
        if family not in made:
            dream = family != "llada"
            with torch.random.fork_rng(devices=[]):  # the same weights, whichever test asks first
                config = replace(tiny(shifted=dream).config, num_kv_heads=1 if dream else 2)
                config = replace(config, **ODD) if family == "odd" else config
                graph = capture_whole(config, top_k=4, debug_logits=dream)
                weights = {name: random_weight(name, like) for name, like in attributes(graph).items()}
                made[family] = materialise(graph, weights | constants(config))
        return copy_of(made[family])

    return get


@pytest.fixture
def feeds() -> tuple[Tensor, ...]:
    """Inputs of three rows, one of them of a single token; one id is banned."""
    ids = torch.randint(0, 36, (3, 7))
    logit_bias = torch.zeros(40)
    logit_bias[37] = -torch.inf
    rows = torch.tensor([[6, 0], [3, 2], [0, 0]])
    return ids, torch.arange(7).expand(3, 7), torch.tensor([7, 4, 1]), rows, logit_bias, torch.tensor([1.0, 0.5, 2.0])
