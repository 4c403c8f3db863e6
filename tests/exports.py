"""Checkpoint folders with weights and a tokenizer, and what the command line makes of them; each made once a session.

Weights are random, so the best id of a row wins by little and quantisation changes many: the limits on quality, which
are set for trained models, are opened (`LOOSE`). All that does not depend on training keeps its limits.
"""

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedModel

from pipeline.__main__ import main
from pipeline.tiny.publish import write_tokenizer
from pipeline.tiny.reference import DREAM_SPECIALS, LLADA_SPECIALS
from pipeline.tiny.tokenizer import train_tokenizer
from tests.pipeline.models.saved import reference, write_as

ROWS = 352
SPECIALS = {"llada": LLADA_SPECIALS, "dream": DREAM_SPECIALS}
LOOSE = ("validation.max_nll_increase=100", "validation.min_argmax_agreement=0")
QUICK = (
    "threads=1",
    "calibration.samples=12",
    "validation.samples=8",
    "generation.gen_length=12",
    "generation.block_length=6",
)
RECIPES: dict[str, tuple[str, ...]] = {
    "fp16": ("lowering.guidance=true",),
    "rtn-w8a8": ("lowering.guidance=true",),
    "rtn-w4a16": ("linear.w_group=32", "attention.k_bits=8", "attention.v_bits=4"),
    "rtn-w4a4": (),
}


def special_ids(family: str) -> dict[str, int]:
    """Ids of the reference tokenizer's special tokens."""
    tokenizer = train_tokenizer(SPECIALS[family])
    return {text: tokenizer.token_to_id(text) for text in SPECIALS[family]}


def saved_model(family: str, *, layers: int, kv_heads: int, tied: bool) -> PreTrainedModel:
    """The random Llama or Qwen2 that `write_model` saves, still in float32."""
    end = special_ids(family)["<|endoftext|>"]
    return reference(
        family,
        kv_heads=kv_heads,
        tied=tied,
        bias=family == "dream",
        vocab_size=ROWS,
        num_hidden_layers=layers,
        intermediate_size=96,
        eos_token_id=end,
        pad_token_id=end,
    )


def write_model(folder: Path, family: str, *, layers: int, kv_heads: int, tied: bool) -> Path:
    """A sharded bfloat16 folder that transformers saved, with the reference models' tokenizer."""
    model = saved_model(family, layers=layers, kv_heads=kv_heads, tied=tied)
    mask = special_ids(family)["<|mask|>" if family == "dream" else "<|mdm_mask|>"]
    write_as(family, model, folder, dtype=torch.bfloat16, shard_size="60KB", mask_id=mask)
    write_tokenizer(folder, family, train_tokenizer(SPECIALS[family]), SPECIALS[family])
    return folder


def settings(recipe: str, *more: str) -> list[str]:
    """`--recipe` and `--set` words of a quick export."""
    sets = (*LOOSE, *QUICK, *RECIPES[recipe], *more)
    return ["--recipe", recipe, *(word for setting in sets for word in ("--set", setting))]


def export(model: Path, output: Path, recipe: str, *words: str) -> int:
    """Exit code of `dllmc export`."""
    return main(["export", str(model), "-o", str(output), *settings(recipe), *words])


def once(folder: Path, make: Callable[[Path], object]) -> Path:
    """`folder`, made by the first process that asks for it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            make(folder)
    return folder


def shared_root(base: Path) -> Path:
    """A folder that all workers of one run share; `base` is pytest's own folder for this process."""
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
