"""Every kernel and path on the device against the torch reference: fresh random inputs, poisoned outputs."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from bench.gpu.cases import CALLS, Case, all_cases, real_cases
from bench.gpu.compare import compare_head, compare_linear, compare_quantize, compare_rotate
from bench.gpu.kernels import Kernels, References
from bench.gpu.operands import Draws
from bench.gpu.section import Item, Plan, Row, Section
from bench.gpu.shapes import MODELS

CASES_A_ROW = 64


def _on_cpu(value: Any) -> Any:
    return value.cpu() if isinstance(value, Tensor) else value


def _outputs(result: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [result.cpu()] if isinstance(result, Tensor) else [tensor.cpu() for tensor in result]


def compare_call(
    op: str, found: list[Tensor], expected: list[Tensor], given: tuple[Any, ...], named: Row
) -> str | None:
    """What is wrong with the outputs of one call, by the rule of its op."""
    if op == "quantize":
        return compare_quantize(found, expected, given[0], named)
    if op == "linear":
        return compare_linear(found[0], expected[0], named.get("swiglu", False))
    if op == "head":
        return compare_head(found, expected)
    return compare_rotate(found[0], expected[0], given[0], given[1])


def check(case: Case, kernels: Kernels, draws: Draws) -> Row:
    """One case: `wrong` says what differs; `refused` why a forced path does not take it."""
    given, named = CALLS[case.op](case, draws)
    try:
        found = _outputs(getattr(kernels, case.op)(*given, **named))
    except ValueError as reason:
        return {"refused": str(reason)}
    given, named = tuple(map(_on_cpu, given)), {name: _on_cpu(value) for name, value in named.items()}
    expected = _outputs(getattr(References(), case.op)(*given, **named))
    wrong = compare_call(case.op, found, expected, given, named)
    return {"wrong": wrong} if wrong else {}


def _check_all(cases: Sequence[Case], plan: Plan, number: int) -> Row:
    kernels, draws = plan.machine.load(True), Draws(plan.machine.device, plan.seed + number)
    row: Row = {"checked": 0, "by_path": {}, "refused": {}, "wrong": {}}
    for case in cases:
        found = check(case, kernels, draws)
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


def _items(plan: Plan) -> Iterator[Item]:
    groups = {"edges": all_cases()[:: plan.every]}
    if not plan.machine.emulated and plan.every == 1:
        groups |= {shape.name: real_cases(shape) for shape in MODELS}
    number = 0
    for name, cases in groups.items():
        for part, start in enumerate(range(0, len(cases), CASES_A_ROW)):
            chosen = cases[start : start + CASES_A_ROW]
            yield f"{name} {part}", lambda chosen=chosen, number=number: _check_all(chosen, plan, number)
            number += 1


def wrong_cases(rows: dict[str, Row]) -> dict[str, str]:
    """Every case that is not right, of a section's rows."""
    return dict(itertools.chain.from_iterable(row["wrong"].items() for row in rows.values()))


CORRECTNESS = Section(
    name="correctness", about="every kernel and path against the torch references", items=_items, slowest_s=30.0
)
