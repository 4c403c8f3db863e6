"""From outcomes to figures: all seeds of one method in one row, everything paired with full precision.

A row stands for one model, method, bits and kind of states. Its mean is that over all seeds, its intervals are of
samples and, where there are several, of seeds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from typing import TYPE_CHECKING, Any

from pipeline.metrics.bootstrap import Interval, alone, joined, non_inferior, paired
from pipeline.metrics.free_run import FreeRun
from pipeline.metrics.free_running import FreeRunning, free_running
from pipeline.metrics.sums import Sums
from pipeline.study.grid import BITS, FULL, Cell

if TYPE_CHECKING:
    from pipeline.recipe import Recipe

MARGIN = 0.01  # of exact match: a point
Outcome = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the tables; `sums` of every seed by figure, empty where `reason` says why; `variant` as of its cells.

    `diverged` counts free runs by the first step after which they differ from that of full precision, None for never;
    `masks_left` has how many positions of them are masked before each step, as a mean.
    """

    model: str
    method: str
    bits: str
    states: str
    variant: str = ""
    reason: str = ""
    recipe: Recipe | None = None
    seeds: tuple[int, ...] = ()
    sums: dict[str, tuple[Sums, ...]] = field(default_factory=dict)
    diverged: dict[int | None, int] = field(default_factory=dict)
    masks_left: tuple[float, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def place(self) -> tuple[str, str]:
        """What methods compete in."""
        return self.model, self.bits

    def mean(self, name: str) -> float:
        """Of all samples and seeds."""
        return joined(self.sums[name]).mean


def figures(outcome: Outcome, full: Outcome) -> dict[str, Sums]:
    """Every figure of one cell, by name; those of free runs are against the run of full precision."""
    tasks = outcome["tasks"]
    found: dict[str, Sums] = {}
    for task, read in READERS.items():
        if task in tasks:
            found |= read(tasks[task])
    if "match" in tasks and outcome is not full:
        free = _parted(outcome, full)
        found |= {"same_tokens": free.tokens, "same_answers": free.identical, "same_steps": free.steps}
    return found


def _parted(outcome: Outcome, full: Outcome) -> FreeRunning:
    runs = [FreeRun.of_json(each["tasks"]["match"]["run"]) for each in (full, outcome)]
    return free_running(runs[0], runs[1], outcome["tasks"]["match"]["eos_id"])


def _nll(task: Any) -> dict[str, Sums]:
    levels = {f"nll.{number}": Sums.of_json(each) for number, each in enumerate(task["by_level"], start=1)}
    return {"nll": Sums.of_json(task["bits"])} | levels


def _agreement(task: Any) -> dict[str, Sums]:
    return {name: Sums.of_json(task[name]) for name in ("argmax", "kl")}


def _match(task: Any) -> dict[str, Sums]:
    score = task["score"]
    kinds = {f"match.{kind}": Sums.of_json(each) for kind, each in score["kinds"].items()}
    return {"match": Sums.of_json(score["total"]), "nfe": Sums.of_json(score["nfe"])} | kinds


def _choice(task: Any) -> dict[str, Sums]:
    kinds = {f"choice.{kind}": Sums.of_json(each) for kind, each in task["kinds"].items()}
    return {"choice": Sums.of_json(task["right"]), "margin": Sums.of_json(task["margin"])} | kinds


def _trajectory(task: Any) -> dict[str, Sums]:
    """Mean squared errors, and errors as shares of the reference's power, at each step and over all."""
    found: dict[str, Sums] = {}
    for way in ("free", "forced"):
        steps = [_share(error, power) for error, power in zip(task[way]["by_step"], task[way]["power"], strict=True)]
        found |= {f"{way}.{number}": each for number, each in enumerate(steps, start=1)}
        squared = [Sums.of_json(error) for error in task[way]["by_step"]]
        found |= {f"{way}_mse.{number}": each for number, each in enumerate(squared, start=1)}
        found[f"{way}_mse"] = Sums.of_json(task[way]["total"])
        found[way] = Sums(
            values=tuple(map(sum, zip(*(each.values for each in steps), strict=True))),
            weights=tuple(map(sum, zip(*(each.weights for each in steps), strict=True))),
        )
    for way, by_step in task["tokens"].items():
        found |= {f"{way}_tokens.{number}": Sums.of_json(each) for number, each in enumerate(by_step, start=1)}
    return found


def _share(error: Any, power: Any) -> Sums:
    return Sums(values=tuple(error["values"]), weights=tuple(power["values"]))


READERS: dict[str, Callable[[Any], dict[str, Sums]]] = {
    "nll": _nll,
    "agreement": _agreement,
    "match": _match,
    "choice": _choice,
    "trajectory": _trajectory,
}


def rows(
    measured: Iterable[tuple[Cell, Outcome]],
    impossible: Iterable[tuple[Cell, str]],
    recipes: Mapping[Cell, Recipe] | None = None,
) -> list[Row]:
    """One row for all seeds of a method, in the order of the grid; full precision comes first for each model."""
    groups: dict[Cell, list[tuple[Cell, Outcome]]] = {}
    why: dict[Cell, str] = {}
    full: dict[str, Outcome] = {}
    for cell, outcome in measured:
        groups.setdefault(_key(cell), []).append((cell, outcome))
        full.setdefault(cell.model, outcome)
    for cell, reason in impossible:
        groups.setdefault(_key(cell), [])
        why[_key(cell)] = reason
    found = [_row(key, members, full.get(key.model), why.get(key, "")) for key, members in groups.items()]
    used = {_key(cell): recipe for cell, recipe in (recipes or {}).items()}
    return [replace(row, recipe=used.get(key)) for key, row in zip(groups, found, strict=True)]


def _key(cell: Cell) -> Cell:
    """The same for all seeds."""
    return replace(cell, seed=0)


def _row(key: Cell, members: Sequence[tuple[Cell, Outcome]], full: Outcome | None, reason: str) -> Row:
    failed = [f"seed {cell.seed}: {outcome['failed']}" for cell, outcome in members if "failed" in outcome]
    named = Row(model=key.model, method=key.method, bits=key.bits, states=key.states, variant=key.variant)
    if reason or failed or full is None:
        return replace(named, reason=reason or "; ".join(failed))
    found = [figures(outcome, full) for _, outcome in members]
    shared = [name for name in found[0] if all(name in each for each in found)]  # free runs may end at other steps
    first = members[0][1]
    parted = [_parted(outcome, full) for _, outcome in members if "same_steps" in shared]
    return replace(
        named,
        seeds=tuple(cell.seed for cell, _ in members),
        sums={name: tuple(each[name] for each in found) for name in shared},
        diverged=Counter(step for each in parted for step in each.first_divergence),
        masks_left=_masks_left(
            [outcome["tasks"]["match"]["run"] for _, outcome in members if "match" in outcome["tasks"]]
        ),
        facts={name: first[name] for name in ("linears", "size_bytes", "runs_in") if name in first},
    )


def _masks_left(runs: Sequence[Any]) -> tuple[float, ...]:
    written = Counter(step for run in runs for row in run["steps"] for step in row)
    rows, left = sum(len(run["steps"]) for run in runs), sum(written.values())
    found = []
    for step in range(1, max(written, default=0) + 1):
        found.append(left / rows)
        left -= written[step]
    return tuple(found)


def beats(first: Row, second: Row) -> Interval:
    """Bits a masked token of `first` less those of `second`: an interval below 0 says that `first` is better."""
    return paired(second.sums["nll"], first.sums["nll"])


def ranks(all_rows: Sequence[Row]) -> dict[int, int]:
    """Rank by place in `all_rows`: 1 + how many rows of the same model and bits are better at 95 %."""
    measured = [number for number, row in enumerate(all_rows) if "nll" in row.sums and row.bits in BITS]
    rank = dict.fromkeys(measured, 1)
    for one, other in combinations(measured, 2):
        if all_rows[one].place == all_rows[other].place:
            found = beats(all_rows[one], all_rows[other])
            rank[other] += found.high < 0
            rank[one] += found.low > 0
    return rank


def as_table(all_rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows as JSON: means with their intervals, what each seed gave, and paired intervals against full precision.

    Of full precision `against_full` is absent; what exists only beside it (KL, agreement) has an `interval` of its own.
    Where there are variants, rows have also what they are `against_first`, the first variant of their model.
    """
    full = {row.model: row for row in all_rows if row.method == FULL}
    first: dict[str, Row] = {}
    for row in all_rows:
        if row.variant:
            first.setdefault(row.model, row)
    rank = ranks(all_rows)
    return [_line(row, full[row.model], first.get(row.model), rank.get(number)) for number, row in enumerate(all_rows)]


def _line(row: Row, full: Row, first: Row | None, rank: int | None) -> dict[str, Any]:
    line: dict[str, Any] = {name: getattr(row, name) for name in ("model", "method", "bits", "states")}
    if row.variant:
        line["variant"] = row.variant
    if row.recipe is not None:
        line["recipe"] = settings(row.recipe)
    if row.reason:
        return line | {"reason": row.reason}
    measured: dict[str, Any] = {}
    for name, sums in row.sums.items():
        measured[name] = {"mean": row.mean(name), "count": sums[0].count}
        if len(row.seeds) > 1:
            measured[name]["seeds"] = [each.mean for each in sums]
        if name not in full.sums:
            found = alone(sums)
            measured[name]["interval"] = {"low": found.low, "high": found.high}
        elif row is not full:
            measured[name]["against_full"] = asdict(paired(full.sums[name], sums))
        if first is not None and row is not full and row is not first and _alike(first.sums.get(name), sums):
            measured[name]["against_first"] = asdict(paired(first.sums[name], sums))
    if "match" in measured and row is not full:
        interval = Interval(**measured["match"]["against_full"])
        measured["match"]["not_inferior"] = non_inferior(interval, MARGIN, higher_is_better=True)
    if row.masks_left:
        line["masks_left"] = list(row.masks_left)
    line |= row.facts | {"seeds": len(row.seeds), "rank": rank, "measured": measured}
    if row.diverged:
        steps = sorted(step for step in row.diverged if step is not None)
        by_step = {str(step): row.diverged[step] for step in steps}
        line["first_divergence"] = by_step | {"never": row.diverged.get(None, 0)}
    return line


def _alike(first: tuple[Sums, ...] | None, second: tuple[Sums, ...]) -> bool:
    """Whether both have it of the same samples; free runs may end at other steps."""
    weighs = [{tuple(weight > 0 for weight in each.weights) for each in sums} for sums in (first or (), second)]
    return weighs[0] == weighs[1] and len(weighs[0]) == 1


def settings(recipe: Recipe) -> dict[str, Any]:
    """What a row was made with: number formats and calibration in full, of the rest what is not the default.

    The seed is left out, since a row has several.
    """
    full = recipe.model_dump(mode="json", exclude={"calibration": {"seed"}, "threads": True})
    changed = recipe.model_dump(mode="json", exclude_defaults=True, exclude={"threads", "description"})
    own = {name: full[name] for name in (recipe.method,) if name in full}
    return changed | own | {name: full[name] for name in ("linear", "head", "attention", "calibration")}
