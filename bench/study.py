"""All methods against each other on both reference models. `python -m bench.study -o DIR [--parts grid draws ...]`

Goes on in DIR where it was stopped. Writes rows and findings of every part to `results/study.json`, the pages to
`results/study.md`; the figures of every level and step, and the pictures, stay in DIR.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.record import RESULTS, write_result
from pipeline.models import BUILTIN
from pipeline.progress import Progress
from pipeline.study.engines import ENGINES
from pipeline.study.grid import QUANTISING, Grid, parse_seeds
from pipeline.study.run import STUDY, Request, study
from pipeline.study.subject import Sizes
from pipeline.study.table import markdown
from pipeline.study.tasks import TASKS

SIZES = Sizes(questions=60)
# Figures of a single noise level, step or kind of question; kinds of exact match are kept.
FINE = ("nll.", "choice.", "free.", "forced.", "free_mse.", "forced_mse.")


@dataclass(frozen=True, kw_only=True)
class Part:
    """One question of the study; `why` heads its page."""

    why: str
    bits: tuple[str, ...]
    methods: tuple[str, ...] = QUANTISING
    states: str = "noised"
    seeds: str = "1"
    tasks: tuple[str, ...] = tuple(TASKS)
    sizes: Sizes = SIZES

    def request(self) -> Request:
        """The same for both reference models."""
        seeds = parse_seeds(self.seeds, self.bits)
        grid = Grid(methods=self.methods, bits=self.bits, states=(self.states,), seeds=seeds)
        models = tuple(f"builtin:{name}" for name in BUILTIN)
        return Request(models=models, grid=grid, tasks=self.tasks, sizes=self.sizes)


PARTS = {
    "grid": Part(why="Every method at every format, one draw", bits=("w8a8", "w4a16", "w3a16", "w4a8", "w4a4")),
    "draws": Part(
        why="W4A4 by three draws of calibration and rotations", bits=("w4a4",), seeds="3", tasks=("nll", "agreement")
    ),
    "exact": Part(
        why="Formats that should lose nothing, on 2,000 problems",
        bits=("w8a8", "w4a16"),
        tasks=("match",),
        sizes=Sizes(problems=2000),
    ),
    "clean": Part(
        why="Calibrated on clean text, as the study does",
        bits=("w4a16", "w4a4"),
        methods=tuple(name for name in QUANTISING if name not in ("rtn", "freeact")),
        states="clean",
        tasks=("nll", "agreement"),
    ),
}


def coarse(row: dict[str, Any]) -> dict[str, Any]:
    """The row without what only pictures need."""
    if "measured" not in row:
        return row
    return row | {"measured": {name: value for name, value in row["measured"].items() if not name.startswith(FINE)}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--engine", choices=ENGINES, default="local")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    options = parser.parse_args()
    found: dict[str, Any] = {}
    pages = []
    for name, part in PARTS.items():
        folder = options.output / name
        if name not in options.parts and not (folder / STUDY).is_file():
            continue  # a part that was finished before stays in the results
        content = study(part.request(), folder, engine=options.engine, jobs=options.jobs, report=Progress())
        found[name] = content | {"why": part.why, "rows": [coarse(row) for row in content["rows"]]}
        pages.append(f"# {part.why}\n\n{markdown(content, [])}")
        for finding in content["findings"]:
            print(f"{name}: {finding['verdict']:<12} {finding['claim']} ({finding['held']} of {finding['of']})")
    print(write_result("study", found))
    (RESULTS / "study.md").write_text("\n".join(pages), encoding="utf-8")


if __name__ == "__main__":
    main()
