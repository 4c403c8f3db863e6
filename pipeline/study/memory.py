"""Whether the cells of a study fit this machine's memory: a lower bound, from the sizes of the weights alone.

It leaves out what comes and goes, so a study that is not refused may still be too large.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from pipeline.errors import WillNotFit
from pipeline.models.checkpoint import Checkpoint
from pipeline.recipe import Recipe
from pipeline.study.measure import Order

MEMINFO = Path("/proc/meminfo")

# What a task makes its subject keep until the cell ends. A session is left out: its weights are mapped from a file.
FULL, SIMULATED = "reference", "candidate"
KEPT: dict[str, frozenset[str]] = {
    "nll": frozenset((FULL, SIMULATED)),
    "agreement": frozenset((FULL, SIMULATED)),
    "match": frozenset(),
    "choice": frozenset((SIMULATED,)),
    "trajectory": frozenset((FULL, SIMULATED)),
}
KEPT_BY_FULL = {"nll", "match", "choice"}  # tasks that ask for full precision where it is itself what is measured

Elements = Mapping[str, int]  # of a model's weights, by part: blocks, embed, head (where it is not tied), norm


def count_elements(checkpoint: Checkpoint) -> Elements:
    """From the headers of the files."""
    counts: Counter[str] = Counter()
    for ours, theirs in checkpoint.tensor_names.items():
        counts[ours.partition(".")[0]] += math.prod(checkpoint.entries[theirs].shape)
    return counts


def cell_bytes(elements: Elements, recipe: Recipe | None, tasks: Collection[str]) -> int:
    """Bytes that one cell keeps at least, by the end of its tasks; `recipe` None is full precision."""
    full = 4 * sum(elements.values())
    if recipe is None:
        return full if KEPT_BY_FULL & {*tasks} else 0
    kept = frozenset[str]().union(*(KEPT[task] for task in tasks))
    return (FULL in kept) * full + (SIMULATED in kept) * _simulated_bytes(elements, recipe)


def _simulated_bytes(elements: Elements, recipe: Recipe) -> int:
    """Codes lie one a byte, whatever their bits; embedding and head are stored apart, even if tied."""
    parts = (
        (elements["blocks"], recipe.linear.w_bits),
        (elements["embed"], recipe.embedding.bits),
        (elements.get("head", elements["embed"]), recipe.head.bits),
    )
    return sum(count * (1 if bits < 16 else 2) for count, bits in parts)


def check_memory(orders: Sequence[Order], elements: Mapping[str, Elements], jobs: int) -> None:
    """Raise WillNotFit where the `jobs` largest cells need more than there is; `elements` go by model.

    Where the system does not say what is available, nothing is refused.
    """
    available = available_bytes()
    if available is None or not orders:
        return
    tasks = orders[0].tasks

    def needed(jobs: int, tasks: Collection[str]) -> int:
        cells = sorted(cell_bytes(elements[order.cell.model], order.recipe, tasks) for order in orders)
        return sum(cells[-jobs:])

    jobs = min(jobs, len(orders))
    if needed(jobs, tasks) <= available:
        return
    fewer = next((n for n in range(jobs - 1, 0, -1) if needed(n, tasks) <= available), None)
    lighter = [task for task in tasks if len(KEPT[task]) < 2]
    mends = [f"--jobs {fewer}"] if fewer else []
    if lighter and needed(jobs, lighter) <= available:
        mends.append(f"--tasks {','.join(lighter)}")
    advice = f"pass {' or '.join(mends)}, or " if mends else ""
    cells = f"{jobs} cells at a time need" if jobs > 1 else "a cell of this study needs"
    raise WillNotFit(
        f"{cells} at least {_gigabytes(needed(jobs, tasks))} of memory for weights, and {_gigabytes(available)} are "
        f"available; {advice}use a "
        "machine with more memory"
    )


def available_bytes() -> int | None:
    """What this machine can give to new programs; None where it does not say."""
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB$", MEMINFO.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def _gigabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.3g} GB"
