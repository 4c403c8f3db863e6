"""What each part of STaR-Quant is worth, on both reference models. `python -m bench.star -o DIR [--parts ablation ...]`

Goes on in DIR where it was stopped. Writes every part to `results/star.json` and `star.md`, errors of hidden states by
denoising step to `star.png`. Rows are compared with full precision and, paired, with the first variant of their part.
"""

from collections.abc import Mapping
from pathlib import Path

from bench.parts import Part, measure_parts
from bench.record import RESULTS
from pipeline.folder import write_bytes
from pipeline.study.grid import Variant
from pipeline.study.plots import STEPS
from pipeline.study.subject import Sizes

PAPER, PLUS = "star-w4a4", "star-plus-w4a4"
FEW = "calibration.samples=128"  # as many as the paper's: a quarter of the recipe's, and of its time
ATTENTION = ("attention.v_bits=4", "attention.prob_bits=4", "attention.prob_scale=unit")  # 15 steps on [0, 1]
BEFORE = ("rtn", "smoothquant", "awq", "quarot", "duquant", "flatquant", "freeact")

LLADA = ("builtin:tiny-llada",)
UNSEEN = Path("bench/unseen")  # a model, its problems and text to calibrate on, which no method was tuned on

# What is taken away or changed. The paper's are blocks of 16 channels, 1/32 of the coordinates a state, a random start.
WITHOUT = {
    "no TAC": ("tac.form=none",),
    "no SGAT": ("star.transform=hadamard", "star.gate=false"),
}
PUBLISHED: dict[str, tuple[str, ...]] = {
    "as published": ("star.share=32", "star.init=random", "star.balance=none", "star.weights=rtn"),
}
BLOCKS = {f"TAC blocks of {size}": (f"tac.block={size}",) for size in (4, 8, 32, 64)}
SHARES = {f"1/{share} a state": (f"star.share={share}",) for share in (16, 32, 64)}
CHANGED = {
    "Hadamard, gated": ("star.transform=hadamard",),
    "gates off": ("star.gate=false",),
    "random first": ("star.init=random",),
    "weights to nearest": ("star.weights=rtn",),
    "TAC paired": ("tac.form=paired",),
    "channels as they are": ("star.balance=none",),
}
STEPS_BACK = {
    "random first": ("star.init=random",),
    "TAC by covariance": ("tac.form=covariance",),
    "weights by GPTQ": ("star.weights=gptq",),
    "weights to nearest": ("star.weights=rtn",),
    "no balance": ("star.balance=none",),
    "channels balanced": ("star.balance=channels",),
    "closest pair": ("star.tile=0",),
    "1/32 a state": ("star.share=32",),
    "no clips": ("star.clip_rate=0",),
    "gates off": ("star.gate=false",),
}


def variants(recipe: str, changes: Mapping[str, tuple[str, ...]], *always: str) -> dict[str, Variant]:
    """The whole recipe first, then with each change; `always` is set in all."""
    return {label: Variant(recipe=recipe, sets=(*always, *sets)) for label, sets in {"whole": (), **changes}.items()}


PARTS = {
    "plus": Part(
        why="STaR-Quant plus, and without its parts, beside the other methods, W4A4",
        bits=("w4a4",),
        methods=BEFORE,
        variants=variants(PLUS, WITHOUT),
        seeds="3",
        tasks=("nll", "agreement", "match"),
    ),
    "paper": Part(
        why="STaR-Quant, and without its parts, W4A4",
        variants=variants(PAPER, WITHOUT),
        seeds="3",
        tasks=("nll", "agreement", "match"),
    ),
    "exact": Part(
        why="What exact match is lost, on 2,000 problems",
        variants={recipe: Variant(recipe=recipe) for recipe in ("star-w8a8", PLUS, PAPER)},
        tasks=("match",),
        sizes=Sizes(problems=2000),
    ),
    "unseen": Part(
        why="The same on a model of other problems and another vocabulary, which no method was tuned on, W4A4",
        models=(str(UNSEEN / "tiny-unseen"),),
        bits=("w4a4",),
        methods=BEFORE,
        variants={recipe: Variant(recipe=recipe) for recipe in (PLUS, PAPER)},
        seeds="3",
        tasks=("nll", "agreement", "match"),
        sizes=Sizes(problems=2000),
        task=UNSEEN / "held_out.jsonl",
        sets=(f"calibration.source=file:{UNSEEN / 'calibration.jsonl'}",),
    ),
    "trajectory": Part(
        why="Hidden states, tokens and masks by denoising step, W4A4",
        bits=("w4a4",),
        methods=("quarot",),
        variants=variants(PAPER, {"no TAC": WITHOUT["no TAC"]}) | {"plus": Variant(recipe=PLUS)},
        tasks=("match", "trajectory"),
        steps=True,
    ),
    "ablation": Part(
        why="STaR-Quant with one thing changed, on 128 canvases, W4A4",
        models=LLADA,
        variants=variants(PAPER, PUBLISHED | CHANGED | BLOCKS | SHARES, FEW),
        tasks=("nll", "agreement"),
    ),
    "steps": Part(
        why="STaR-Quant plus, its single steps back, W4A4",
        models=LLADA,
        variants=variants(PLUS, STEPS_BACK),
        tasks=("nll", "agreement"),
    ),
    "attention": Part(
        why="STaR-Quant with values and probabilities of attention at 4 bits, on 128 canvases",
        variants=variants(PAPER, {"no TAC": WITHOUT["no TAC"], "TAC paired": ("tac.form=paired",)}, FEW, *ATTENTION),
        seeds="3",
        tasks=("nll", "agreement"),
    ),
}


if __name__ == "__main__":
    picture = measure_parts("star", PARTS, __doc__) / "trajectory" / STEPS
    if picture.is_file():
        write_bytes(RESULTS / "star.png", picture.read_bytes())
