"""NVIDIA's compute-sanitizer over a part of the correctness cases: bad addresses, races, wrong barriers."""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from bench.gpu.section import Item, Plan, Row, Section, read_rows
from plugins.toolchain import ToolMissingError, cuda_program

TOOLS = ("memcheck", "racecheck", "synccheck")
EVERY = 11  # of the cases; instrumented kernels are slow
LIMIT_S = 170
FOUND = 9


def _summary(text: str) -> int | None:
    """Errors that the tool counts, or None where it printed no summary."""
    found = re.search(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard", text)
    return None if found is None else int(found[1] or found[2])


def sanitize(plan: Plan, tool: str) -> Row:
    """One tool over every `EVERY`-th case, in a process of its own; `errors` is None where it could not run."""
    try:
        program = cuda_program("compute-sanitizer")
    except ToolMissingError as reason:
        return {"errors": None, "reason": str(reason)}
    with tempfile.TemporaryDirectory() as work:
        checker = [str(program), "--tool", tool, "--kernel-name", "kns=dllmc", "--error-exitcode", str(FOUND)]
        checker += ["--report-api-errors", "no", "--print-limit", "20"]
        bench = [sys.executable, "-m", "bench.gpu", "--only", "correctness", "--every", str(EVERY)]
        bench += ["--work", work, "--results", work]
        bench += ["--library", str(plan.machine.library), "--seed", str(plan.seed), "--budget-s", str(LIMIT_S)]
        # Without torch's cache every tensor is an allocation of its own, so a step over its end is seen.
        environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        try:
            done = subprocess.run(  # noqa: S603
                [*checker, *bench],
                capture_output=True,
                text=True,
                check=False,
                timeout=LIMIT_S + 20,
                env=environment,
                cwd=Path(__file__).parents[2],
            )
        except subprocess.TimeoutExpired:
            return {"errors": None, "reason": f"did not end in {LIMIT_S + 20} s"}
        rows = read_rows(Path(work), "correctness")["rows"]
    text = done.stdout + done.stderr
    row: Row = {"errors": _summary(text), "exit": done.returncode, "tail": text[-2000:]}
    row |= {"checked": sum(r["checked"] for r in rows.values()), "wrong": sum(len(r["wrong"]) for r in rows.values())}
    if row["errors"] is None or not row["checked"]:
        row |= {"errors": None, "reason": "the tool printed no summary" if row["checked"] else "no case ran under it"}
    return row


def _items(plan: Plan) -> Iterator[Item]:
    if not plan.machine.emulated:
        for tool in TOOLS:
            yield tool, partial(sanitize, plan, tool)


def _said(row: Row) -> str:
    return str(row.get("reason") or f"{row['errors']} errors in {row['checked']} cases")


SANITIZER = Section(
    name="sanitizer", about="compute-sanitizer over some cases", items=_items, said=_said, slowest_s=LIMIT_S + 25.0
)
