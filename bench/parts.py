"""Studies of several parts: each is a question of its own, measured in a folder of its own that is kept and resumed."""

import argparse
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.record import RESULTS, write_result
from pipeline.models import BUILTIN
from pipeline.progress import Progress
from pipeline.study.engines import ENGINES
from pipeline.study.grid import Grid, Variant, parse_seeds
from pipeline.study.run import STUDY, Request, study
from pipeline.study.subject import Sizes
from pipeline.study.table import markdown
from pipeline.study.tasks import TASKS

MODELS = tuple(f"builtin:{name}" for name in BUILTIN)
SIZES = Sizes(questions=60)
# Figures of a single noise level, step or kind of question; kinds of exact match are kept.
FINE = re.compile(r"\.\d+$|^choice\.")


@dataclass(frozen=True, kw_only=True)
class Part:
    """One question of a study; `why` heads its page. `steps` keeps the figures of every step in the results.

    `task` is a file of items to ask, `sets` change every recipe.
    """

    why: str
    models: tuple[str, ...] = MODELS
    bits: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    variants: Mapping[str, Variant] = field(default_factory=dict)
    states: str = "noised"
    seeds: str = "1"
    tasks: tuple[str, ...] = tuple(TASKS)
    sizes: Sizes = SIZES
    task: Path | None = None
    sets: tuple[str, ...] = ()
    steps: bool = False

    def request(self) -> Request:
        """The same for all models."""
        bits = tuple(dict.fromkeys((*self.bits, *(variant.bits for variant in self.variants.values()))))
        grid = Grid(
            methods=self.methods,
            bits=self.bits,
            variants=self.variants,
            states=(self.states,),
            seeds=parse_seeds(self.seeds, bits),
            sets=self.sets,
        )
        return Request(models=self.models, grid=grid, tasks=self.tasks, sizes=self.sizes, task=self.task)


def coarse(row: dict[str, Any]) -> dict[str, Any]:
    """The row without what only pictures need."""
    if "measured" not in row:
        return row
    return row | {"measured": {name: value for name, value in row["measured"].items() if not FINE.search(name)}}


def measure_parts(name: str, parts: Mapping[str, Part], about: str | None) -> Path:
    """What the command line asks for; writes `results/<name>.json` and `.md`, and returns the folder of the parts."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--engine", choices=ENGINES, default="local")
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    options = parser.parse_args()
    output: Path = options.output
    found: dict[str, Any] = {}
    pages = []
    for label, part in parts.items():
        folder = output / label
        if label not in options.parts and not (folder / STUDY).is_file():
            continue  # a part that was finished before stays in the results
        content = study(part.request(), folder, engine=options.engine, jobs=options.jobs, report=Progress())
        rows = content["rows"] if part.steps else [coarse(row) for row in content["rows"]]
        found[label] = content | {"why": part.why, "rows": rows}
        pages.append(f"# {part.why}\n\n{markdown(content, [])}")
        for finding in content["findings"]:
            print(f"{label}: {finding['verdict']:<12} {finding['claim']} ({finding['held']} of {finding['of']})")
    print(write_result(name, found))
    (RESULTS / f"{name}.md").write_text("\n".join(pages), encoding="utf-8")
    return output
