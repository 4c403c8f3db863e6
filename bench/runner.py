"""What the cache is worth: speed against the loop without it, and exact match beside it. `python -m bench.runner`

Tokens are counted up to the first end-of-text and the prefill is in the time. Speeds are medians over interleaved
repeats in one process: of whole canvases, end-of-text forbidden, and of answers, which end after a few passes of which
one must be full. Exit 1 where a target is missed.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.record import write_result
from pipeline.evaluation import says
from pipeline.metrics.bootstrap import non_inferior, paired
from pipeline.metrics.sums import Sums
from pipeline.models import BUILTIN
from pipeline.progress import Progress
from pipeline.recipe_file import load_recipe
from pipeline.runner import GenerateOptions, Runner, TextModel
from pipeline.runner.benchmark import Case, benchmark
from pipeline.stages import export
from pipeline.tiny.problems import Problem, held_out

SPEED_MODEL = "tiny-llada"
CANVAS = 256
BLOCK = 32
GEN_LENGTH = 32  # the length that the reference models know, for accuracy
BLOCKS = (32, 8)  # one block, and four: each later one reads keys and values that an earlier one left
ENDS = {"whole canvases": "forbid", "answers": "none"}  # how each kind of speed treats end-of-text
ONE_POINT = 0.01
MIN_TPF = 2.0
MIN_CACHED = 2.0  # cached against exact, the same policy at batch 1
MIN_BATCHED = 4.0  # cached threshold at batch 8 against exact quota at batch 1
MAX_HOST_MS = 0.3  # a step at batch 8, beyond the passes

QUOTA_EXACT, THRESHOLD_EXACT, QUOTA_CACHED, THRESHOLD_CACHED, BATCHED = range(5)


def speed_cases(gen_length: int, eos: str) -> list[Case]:
    """In the order of the five names above."""
    quota = GenerateOptions(gen_length=gen_length, block_length=BLOCK, policy="quota", eos=eos)
    threshold = replace(quota, policy="threshold")
    alone = [replace(quota, exact=True), replace(threshold, exact=True), quota, threshold]
    return [*(Case(options=options, batch_size=1) for options in alone), Case(options=threshold, batch_size=8)]


def speed(runner: Runner, items: Sequence[Problem], eos: str, repeats: int) -> dict[str, Any]:
    """Tokens per second of the five cases on a canvas of 256, their ratios and the host's share."""
    prompts = [runner.encode(item.prompt) for item in items]
    gen_length = (CANVAS - max(map(len, prompts))) // BLOCK * BLOCK
    found = benchmark(runner.engine, prompts, speed_cases(gen_length, eos), repeats=repeats)
    rates = [case["tokens_per_second"] for case in found["cases"]]
    host_ms = found["cases"][BATCHED]["host_ms_per_step"]
    ratios = {
        "cached_threshold_to_exact": rates[THRESHOLD_CACHED] / rates[THRESHOLD_EXACT],
        "cached_quota_to_exact": rates[QUOTA_CACHED] / rates[QUOTA_EXACT],
        "batch_8_threshold_to_exact_quota": rates[BATCHED] / rates[QUOTA_EXACT],
    }
    least = dict(zip(ratios, (MIN_CACHED, MIN_CACHED, MIN_BATCHED), strict=True))
    missed = [name for name, ratio in ratios.items() if not ratio >= least[name]]
    if not host_ms <= MAX_HOST_MS:
        missed.append("host_ms_per_step")
    return {"gen_length": gen_length, "ratios": ratios, "host_ms_per_step": host_ms, "missed": missed, **found}


def accuracy(runner: TextModel, items: Sequence[Problem], block_length: int) -> dict[str, Any]:
    """Exact match of the cached and of the exact loop on the same problems, the interval of their difference, TPF."""
    options = GenerateOptions(gen_length=GEN_LENGTH, block_length=block_length)
    prompts = [item.prompt for item in items]
    shares = []
    for each in (replace(options, exact=True), options):
        answers = runner.generate(prompts, each)
        shares.append([says(runner, a.text, item.answer) for a, item in zip(answers, items, strict=True)])
    tpf = sum(answer.result.tpf for answer in answers) / len(answers)
    exact, cached = (Sums.of_shares(each) for each in shares)
    interval = paired([exact], [cached])
    met = {"one point": non_inferior(interval, ONE_POINT, higher_is_better=True), "tpf": tpf >= MIN_TPF}
    return {
        "gen_length": GEN_LENGTH,
        "block_length": block_length,
        "count": len(items),
        "exact": exact.mean,
        "cached": cached.mean,
        "difference": vars(interval),
        "tpf": tpf,
        "missed": [name for name, met in met.items() if not met],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="rtn-w8a8")
    parser.add_argument("--count", type=int, default=2000, help="problems of the accuracy")
    parser.add_argument("--prompts", type=int, default=16, help="prompts of the speed")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    items, rows = held_out(options.count), []
    for model in BUILTIN:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / model
            export(f"builtin:{model}", folder, load_recipe(options.recipe), validate=False, report=Progress())
            runner = Runner(folder, options.threads)
            facts = {"model": model, "recipe": options.recipe, "threads": options.threads}
            for of, eos in ENDS.items() if model == SPEED_MODEL else ():
                found = speed(runner, items[: options.prompts], eos, options.repeats)
                rows.append({"what": "speed", "of": of, **facts, **found})
            rows += [{"what": "accuracy", **facts, **accuracy(runner, items, block)} for block in BLOCKS]
    for row in rows:
        print({key: value for key, value in row.items() if key != "cases"})
    print(write_result("runner", rows))
    sys.exit(any(row["missed"] for row in rows))


if __name__ == "__main__":
    main()
