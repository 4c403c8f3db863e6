"""Do ONNX Runtime and the simulated graph in torch generate the same ids? `python -m bench.parity`

For every prompt on which they part, the first step that differs is found and described. Exit 1 outside the limits.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.record import write_result
from pipeline.backends.backend import Feeds, FullPasses, Record, Session
from pipeline.backends.ort import open_session
from pipeline.folder import MODEL
from pipeline.lower import write_onnx
from pipeline.models import BUILTIN, resolve
from pipeline.models.checkpoint import open_checkpoint
from pipeline.models.tokenizer import read_tokenizer
from pipeline.quantize import Weights, write_weights
from pipeline.recipe_file import load_recipe
from pipeline.runner import GenerateOptions, Settings, Step, TextModel, generate
from pipeline.tiny.problems import held_out
from pipeline.validate import torch_session

RECIPES = ("fp16", "rtn-w8a8", "rtn-w4a16", "rtn-w4a4")


MIN_SAME = 0.99
MAX_MARGIN = 1e-3


@dataclass(frozen=True, kw_only=True)
class Parting:
    """Where two sessions part, at the first step that differs.

    `kind` is token (another id), commit (other positions) or batch (only in a batch: rows are not independent).
    `margin` is that of the best two logits there, the largest of the positions concerned; `to_threshold` the least
    distance of their confidence from the policy's threshold.
    """

    prompt: int
    step: int
    kind: str
    margin: float
    to_threshold: float


class _Watched(FullPasses):
    """A session that keeps the records of its passes, all of them full."""

    def __init__(self, inner: Session) -> None:
        self.inner, self.top_k = inner, inner.top_k
        self.records: list[Record] = []

    def full_pass(self, feeds: Feeds) -> Record:
        self.records.append(self.inner.run(feeds))
        return self.records[-1]

    def close(self) -> None:
        self.inner.close()


def partings(
    first: Session,
    second: Session,
    settings: Settings,
    prompts: Sequence[Sequence[int]],
    options: GenerateOptions,
    batch_size: int = 32,
) -> list[Parting]:
    """Every prompt whose generated ids differ, and why; greedy decoding with the threshold policy in one block.

    Without a cache: torch has none, and what was kept from earlier passes would be another reason to part.
    """
    results = [generate(session, settings, prompts, options, batch_size=batch_size) for session in (first, second)]
    different = [i for i, (a, b) in enumerate(zip(*results, strict=True)) if a.ids != b.ids]
    return [_explain(first, second, settings, prompts[i], options, i) for i in different]


def _explain(
    first: Session,
    second: Session,
    settings: Settings,
    prompt: Sequence[int],
    options: GenerateOptions,
    number: int,
) -> Parting:
    traces: list[list[Step]] = [[], []]
    watched = [_Watched(first), _Watched(second)]
    for session, trace in zip(watched, traces, strict=True):
        generate(session, settings, [prompt], options, request_ids=[number], on_step=trace.append)
    for step, (ours, theirs) in enumerate(zip(*traces, strict=False)):
        if np.array_equal(ours.region, theirs.region):
            continue
        record = watched[0].records[step]
        both = np.intersect1d(ours.committed, theirs.committed)
        tokens = [int(p) for p in both if ours.region[p] != theirs.region[p]]
        places = tokens or np.setxor1d(ours.committed, theirs.committed).tolist()
        logits = record.top_logits[0, places]
        confidence = 1.0 / (1.0 + record.tail[0, places].astype(np.float64))
        return Parting(
            prompt=number,
            step=step,
            kind="token" if tokens else "commit",
            margin=float((logits[:, 0] - logits[:, 1]).max()),
            to_threshold=float(np.abs(confidence - options.threshold).min()),
        )
    return Parting(prompt=number, step=0, kind="batch", margin=float("inf"), to_threshold=float("inf"))


def measure(model: str, recipe_name: str, count: int) -> dict[str, Any]:
    """Parity of one built-in model under one recipe on held-out problems."""
    checkpoint, recipe = open_checkpoint(resolve(f"builtin:{model}")), load_recipe(recipe_name)
    source = read_tokenizer(checkpoint.folder, checkpoint.config)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        write_weights(checkpoint, recipe, work / "weights", on_piece=lambda _: None)
        weights = Weights(work / "weights")
        write_onnx(checkpoint.config, recipe, weights, work / MODEL, on_weight=lambda _: None)
        runtime = open_session(work / MODEL, threads=recipe.threads)
        simulated = torch_session(checkpoint, recipe, weights, lowered=False)
    settings = Settings.of_model(checkpoint.config)
    text = TextModel(simulated, settings, source.parsed())
    prompts = [text.encode(problem.prompt) for problem in held_out(count)]
    found = partings(simulated, runtime, settings, prompts, GenerateOptions(exact=True))
    return {
        "model": model,
        "recipe": recipe_name,
        "prompts": count,
        "same": count - len(found),
        "partings": [vars(one) for one in found],
    }


def within_limits(row: dict[str, Any]) -> bool:
    """At least 99 % the same, and no parting where the model had a clear choice."""
    margins = [parting["margin"] for parting in row["partings"]]
    return row["same"] >= MIN_SAME * row["prompts"] and all(margin < MAX_MARGIN for margin in margins)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200)
    options = parser.parse_args()
    rows = [measure(model, recipe, options.count) for model in BUILTIN for recipe in RECIPES]
    for row in rows:
        print(f"{row['model']} {row['recipe']}: {row['same']} of {row['prompts']} the same, {row['partings']}")
    print(write_result("parity", rows))
    sys.exit(0 if all(within_limits(row) for row in rows) else 1)


if __name__ == "__main__":
    main()
