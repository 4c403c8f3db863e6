"""The correctness section on the emulated kernels: some cases of every op on every path, as on a GPU."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from bench.gpu.correctness import CORRECTNESS, wrong_cases
from bench.gpu.machine import Machine
from bench.gpu.section import Plan, measure, read_rows


def test_emulated_kernels_are_right_on_every_path(emulated: Machine, plan: Callable[..., Plan], tmp_path: Path) -> None:
    chosen = dataclasses.replace(plan(every=29), machine=emulated)
    assert measure(CORRECTNESS, chosen, again=False)
    rows = read_rows(tmp_path, CORRECTNESS.name)["rows"]
    assert wrong_cases(rows) == {}
    ran = {path for row in rows.values() for path in row["by_path"]}
    assert ran >= {f"linear {path}" for path in ("auto", "naive", "small", "large", "hopper")}
    assert ran >= {f"quantize {path}" for path in ("auto", "naive", "rows", "tile", "exact")}
    assert ran >= {"head auto", "head naive", "rotate auto", "rotate naive"}
    refused = {key.split()[-1] for row in rows.values() for key in row["refused"]}
    assert refused <= {"rows", "tile"}, "only these take less than every call"
