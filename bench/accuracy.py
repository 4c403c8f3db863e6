"""Exact match of the reference models, full precision and rounded to nearest. `python -m bench.accuracy`

The same path as `dllmc eval`: a checkpoint runs at full precision in torch, a bundle in ONNX Runtime.
All methods are in `bench.study`.
"""

import argparse
import tempfile
from pathlib import Path

from bench.record import write_result
from pipeline.evaluation import Score, evaluate, open_model, read_task
from pipeline.models import BUILTIN
from pipeline.progress import Progress
from pipeline.recipe_file import load_recipe
from pipeline.runner import GenerateOptions
from pipeline.stages import export

RECIPES = ("fp16", "rtn-w8a8", "rtn-w4a16", "rtn-w4a4")
TASK = Path(__file__).parent.parent / "pipeline" / "tiny" / "held_out.jsonl"


def score(model: str, count: int) -> Score:
    """One model or bundle on the first `count` held-out problems, default generation."""
    return evaluate(open_model(model), read_task(TASK, count), GenerateOptions())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=500)
    options = parser.parse_args()
    rows = []
    for model in BUILTIN:
        rows.append({"model": model, "recipe": "full precision", **vars(score(f"builtin:{model}", options.count))})
        for name in RECIPES:
            with tempfile.TemporaryDirectory() as scratch:
                folder = Path(scratch) / name
                export(f"builtin:{model}", folder, load_recipe(name), validate=False, report=Progress())
                rows.append({"model": model, "recipe": name, **vars(score(str(folder), options.count))})
    for row in rows:
        print(row)
    print(write_result("accuracy", rows))


if __name__ == "__main__":
    main()
