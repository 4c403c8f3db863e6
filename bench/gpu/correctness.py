"""Every kernel and path on the device against the torch reference: fresh random inputs, poisoned outputs."""

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial

from bench.gpu.cases import CALLS, Case, all_cases, real_cases
from bench.gpu.compare import compare_call
from bench.gpu.compared import check_model, on_cpu, outputs
from bench.gpu.kernels import Kernels, References
from bench.gpu.operands import Draws
from bench.gpu.section import Item, Plan, Row, Section
from bench.gpu.shapes import MODELS, TINY_MODELS

CASES_A_ROW = 64


def check(case: Case, kernels: Kernels, draws: Draws, on_device: bool = False) -> Row:
    """One case: `wrong` says what differs; `refused` why a forced path does not take it.

    The reference runs on the CPU, at real sizes `on_device`: its integers are exact and its roundings single there too.
    """
    given, named = CALLS[case.op](case, draws)
    try:
        result = getattr(kernels, case.op)(*given, **named)
    except ValueError as reason:
        return {"refused": str(reason)}
    if not on_device:
        given, named = on_cpu(given), dict(zip(named, on_cpu(tuple(named.values())), strict=True))
    reference = getattr(References(), case.op)(*given, **named)
    found, expected = (outputs(values, given[0].device) for values in (result, reference))
    wrong = compare_call(case.op, found, expected, given, named)
    return {"wrong": wrong} if wrong else {}


def _check_all(cases: Sequence[Case], plan: Plan, number: int, on_device: bool) -> Row:
    kernels, draws = plan.machine.load(True), Draws(plan.machine.device, plan.seed + number)
    row: Row = {"checked": 0, "by_path": {}, "refused": {}, "wrong": {}}
    for case in cases:
        found = check(case, kernels, draws, on_device)
        if "refused" in found:
            row["refused"][case.key] = found["refused"]
            if case.path in ("auto", "naive"):  # these take everything
                row["wrong"][case.key] = f"refused: {found['refused']}"
            continue
        row["checked"] += 1
        path = f"{case.op} {case.path}"
        row["by_path"][path] = row["by_path"].get(path, 0) + 1
        if "wrong" in found:
            row["wrong"][case.key] = found["wrong"]
            print(f"WRONG {case.key}: {found['wrong']}")
    plan.machine.synchronize()
    return row


def thinned(cases: Sequence[Case], every: int) -> list[Case]:
    """The first, and every n-th after it, of each op on each path."""
    seen: Counter[tuple[str, str]] = Counter()
    kept = []
    for case in cases:
        if seen[case.op, case.path] % every == 0:
            kept.append(case)
        seen[case.op, case.path] += 1
    return kept


def _items(plan: Plan) -> Iterator[Item]:
    groups = {"edges": thinned(all_cases(), plan.every)}
    if not plan.machine.emulated and plan.every == 1:
        groups |= {shape.name: real_cases(shape) for shape in MODELS}
    number = 0
    for name, cases in groups.items():
        for part, start in enumerate(range(0, len(cases), CASES_A_ROW)):
            chosen = cases[start : start + CASES_A_ROW]
            key = f"{name} {part}" if plan.every == 1 else f"{name} {part}, every {plan.every}th"
            yield key, partial(_check_all, chosen, plan, number, name != "edges")
            number += 1
    for shape in TINY_MODELS if plan.every == 1 else ():
        yield shape.name, partial(check_model, plan.machine, shape, plan.seed)


def wrong_cases(rows: dict[str, Row]) -> dict[str, str]:
    """Every case that is not right, of a section's rows."""
    return dict(itertools.chain.from_iterable(row["wrong"].items() for row in rows.values()))


def _said(row: Row) -> str:
    return f"{row['checked']} checked, {len(row['refused'])} refused, {len(row['wrong'])} wrong"


CORRECTNESS = Section(
    name="correctness",
    about="every kernel and path against the torch references",
    items=_items,
    said=_said,
    slowest_s=30.0,
)
