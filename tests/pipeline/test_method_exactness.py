"""What a method rewrites before it rounds anything leaves the float model's logits where they were."""

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor

from passes.graph import attributes
from passes.methods import METHODS
from pipeline.calibration.states import States
from pipeline.capture import materialise
from pipeline.models import BUILTIN
from pipeline.models.checkpoint import Checkpoint, load_model
from tests.exports import shared_root
from tests.pipeline.fitted import (
    SIZES,
    built_in_states,
    checkpoint_of,
    feeds_of,
    quick_recipe,
    random_states,
    rewritten_graph,
)

# Of the largest logit. Weights are folded in float64 and stored in float32: what is left, 2e-6 on these models, is that
# float32 sums in another order. The promise to users is 1e-4.
TOLERANCE = 1e-5
UNCHANGED = {"none", "rtn", "gptq"}  # methods that only round
Case = tuple[Checkpoint, States, Tensor]


def cases() -> list[tuple[str, tuple[int, int], str]]:
    """Every method with float activations and with integer ones, where it has both: only these get online nodes."""
    chosen = []
    for name, method in METHODS.items():
        if name not in UNCHANGED:
            chosen += [(name, (4, 4), model) for model in (*SIZES, *BUILTIN)]
            chosen += [(name, (4, 16), model) for model in SIZES if (4, 16) in method.formats]
    return chosen


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """A model, canvases and the logits of the untouched model on them."""
    root = shared_root(tmp_path_factory.getbasetemp()) / "random"

    @cache
    def made(name: str) -> Case:
        checkpoint = checkpoint_of(name, root)
        states = built_in_states(checkpoint) if name in BUILTIN else random_states(checkpoint)
        ids, positions, kv_len, *_ = feeds_of(checkpoint, states)
        with torch.no_grad():
            return checkpoint, states, load_model(checkpoint).logits(ids, positions, kv_len)

    return made


@pytest.mark.parametrize(("method", "bits", "name"), cases(), ids=str)
@torch.no_grad()
def test_logits_stay(case: Callable[[str], Case], method: str, bits: tuple[int, int], name: str) -> None:
    checkpoint, states, expected = case(name)
    sets = ["attention.k_bits=4", "attention.v_bits=4"] if bits == (4, 4) else []
    sets += ["linear.w_group=0"] if name == "odd" else []
    whole, weights, changed = rewritten_graph(checkpoint, quick_recipe(method, bits, *sets), states)
    assert changed
    shapes = {key: (value.shape, value.dtype) for key, value in attributes(whole).items()}
    assert shapes == {key: (value.shape, value.dtype) for key, value in weights.items()}
    *_, found = materialise(whole, weights)(*feeds_of(checkpoint, states))
    valid = torch.arange(found.shape[1])[None, :] < states.kv_len[:, None]
    difference = (found - expected)[valid].abs().max() / expected[valid].abs().max()
    assert difference <= TOLERANCE, f"{method} moves the logits by {float(difference):.2g}"


def test_methods_that_only_round_rewrite_nothing() -> None:
    names = set(METHODS) & UNCHANGED
    assert {name for name, method in METHODS.items() if method.rewrite is METHODS["none"].rewrite} == names
