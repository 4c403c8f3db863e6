"""All methods against each other on both reference models. `python -m bench.study -o DIR`

Goes on in DIR where it was stopped. Writes the rows and findings to `results/study.json`, the page to
`results/study.md`; the figures of every level and step, and the pictures, stay in DIR.
"""

import argparse
from pathlib import Path
from typing import Any

from bench.record import RESULTS, write_result
from pipeline.models import BUILTIN
from pipeline.progress import Progress
from pipeline.study.engines import ENGINES
from pipeline.study.grid import QUANTISING, Grid, parse_seeds
from pipeline.study.run import Request, study
from pipeline.study.subject import Sizes
from pipeline.study.table import markdown
from pipeline.study.tasks import TASKS

BITS = ("w8a8", "w4a16", "w3a16", "w4a8", "w4a4")
SEEDS = "1,w4a4=3"
# Figures of a single noise level, step or kind of question; kinds of exact match are kept.
FINE = ("nll.", "choice.", "free.", "forced.", "free_mse.", "forced_mse.")


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
    parser.add_argument("--methods", nargs="+", choices=QUANTISING, default=list(QUANTISING))
    parser.add_argument("--states", nargs="+", default=["noised"])
    parser.add_argument("--questions", type=int, default=100)
    options = parser.parse_args()
    request = Request(
        models=tuple(f"builtin:{name}" for name in BUILTIN),
        grid=Grid(
            methods=tuple(options.methods), bits=BITS, states=tuple(options.states), seeds=parse_seeds(SEEDS, BITS)
        ),
        tasks=tuple(TASKS),
        sizes=Sizes(questions=options.questions),
    )
    content = study(request, options.output, engine=options.engine, jobs=options.jobs, report=Progress())
    print(write_result("study", content | {"rows": [coarse(row) for row in content["rows"]]}))
    (RESULTS / "study.md").write_text(markdown(content, []), encoding="utf-8")
    for finding in content["findings"]:
        print(f"{finding['verdict']:<12} {finding['claim']} ({finding['held']} of {finding['of']})")


if __name__ == "__main__":
    main()
