"""Every promised line is judged from the rows alone, and a line that may not be quoted says why."""

import json
import re
from typing import Any

import pytest

from bench.gpu.shapes import DREAM, LLADA, MODELS, ROWS
from bench.gpu.verdicts import Verdict, baseline_shares, verdicts
from bench.record import RESULTS

BANDWIDTH, PEAK = 4.0e12, 800e12


def times(ms: float) -> dict[str, float]:
    return {"ms": ms, "ms_min": ms, "ms_max": ms}


def measured() -> dict[str, Any]:
    """Sections in which every line holds."""
    gemm = {}
    for shape in MODELS:
        for linear in shape.gemms:
            for rows in ROWS:
                seconds = linear.weights / 2 / BANDWIDTH / 0.8
                contenders = {"bf16": times(3e3 * seconds), "auto": times(1e3 * seconds)}
                row = {"contenders": contenders, "bytes": linear.weights // 2, "rows": rows}
                gemm[f"{shape.name} {linear.name} {rows}"] = row
    elementwise = {
        f"LLaDA-8B qkv {rows}": {"rows": rows, "bytes_per_s": {"auto": 3.6e12, "copy": 4e12, "negation": 3.9e12}}
        for rows in (32, 512, 8192)
    }
    checked = [f"linear {path}" for path in ("auto", "naive", "small", "large", "hopper")]
    checked += [f"quantize {path}" for path in ("auto", "naive", "rows", "tile", "exact")]
    checked += [f"{op} {path}" for op in ("head", "rotate") for path in ("auto", "naive")]
    return {
        "correctness": {"edges 0": {"checked": 9, "by_path": dict.fromkeys(checked, 1), "wrong": {}}},
        "sanitizer": {tool: {"errors": 0, "checked": 9, "wrong": 0} for tool in ("memcheck", "racecheck", "synccheck")},
        "ceilings": {"bandwidth": {"bandwidth": BANDWIDTH, "copy": BANDWIDTH}, "products": {"bf16_flops": PEAK}},
        "gemm": gemm,
        "elementwise": elementwise,
        "passes": {f"{shape.name} star": passes_of(shape) for shape in MODELS},
        "loops": {f"{shape.name} star": loops_of() for shape in MODELS},
    }


def passes_of(shape: Any) -> dict[str, Any]:
    forms = {"bf16": 16e9, "int8 head": 5e9, "int8 head and embedding": 4.5e9}
    found: dict[str, Any] = {"weight_bytes": forms, "passes": {}}
    found["peak_bytes"] = {
        form: dict.fromkeys(("full 512", "full 1024", "block"), size) for form, size in forms.items()
    }
    for name, rows, slots in (("full 512", 512, 512), ("full 1024", 1024, 1024), ("block", 32, 512)):
        floor = max(shape.flops(rows, slots, 32) / PEAK / 0.75, shape.bytes_read(slots, 2.0) / BANDWIDTH / 0.75)
        ratio = {"ratio": 2.6, "ratio_min": 2.5, "ratio_max": 2.7}
        found["passes"][name] = {"rows": rows, "slots": slots, "head_rows": 32, "bf16": times(1e3 * floor), **ratio}
    return found


def loops_of() -> dict[str, Any]:
    names = [f"canvas {size} {kind}" for size in (512, 1024) for kind in ("cached", "uncached")]
    rates = {"ours": {"tokens_per_s": 170.0}, "bf16": {"tokens_per_s": 100.0}}
    return {name: {**rates, "ratio": 1.7, "ratio_min": 1.6, "ratio_max": 1.8} for name in names}


def by_line(sections: dict[str, Any]) -> dict[str, Verdict]:
    return {verdict.line: verdict for verdict in verdicts(sections, arch=90, complete=list(sections))}


def test_all_lines_hold() -> None:
    found = by_line(measured())
    outcomes = {verdict.outcome for verdict in found.values()}
    assert outcomes == {"pass", "reported"}
    assert {line for line, verdict in found.items() if verdict.outcome == "reported"} == {
        f"Dream-7B star, {form}: {what}"
        for form in ("int8 head", "int8 head and embedding")
        for what in ("weights", "peak, full 512 pass", "peak, full 1024 pass", "peak, block pass")
    }
    share = found["LLaDA-8B linears, 32 rows, of bandwidth"]
    assert share.figure == pytest.approx(0.8)
    assert share.note == "bf16 reaches 1.07"  # four times the bytes in three times the time


def test_the_same_lines_wait_where_nothing_was_measured() -> None:
    empty = by_line({})
    assert set(empty) == set(by_line(measured()))
    assert {verdict.outcome for verdict in empty.values()} == {"waiting"}
    assert all(str(verdict).startswith("WAITING") for verdict in empty.values())


def test_a_slow_kernel_fails_its_lines() -> None:
    sections = measured()
    sections["gemm"]["LLaDA-8B gate_up 32"]["contenders"]["auto"]["ms"] *= 2
    sections["elementwise"]["LLaDA-8B qkv 512"]["bytes_per_s"]["auto"] = 3e12
    sections["passes"]["LLaDA-8B star"]["passes"]["block"]["ratio"] = 2.4
    failed = {line: verdict for line, verdict in by_line(sections).items() if verdict.outcome == "fail"}
    assert set(failed) == {
        "LLaDA-8B linears, 32 rows, against cuBLAS bf16",
        "LLaDA-8B linears, 32 rows, of bandwidth",
        "fused element-wise kernels, of a copy of as many bytes, 512 rows and more",
        "LLaDA-8B star block pass, 32 rows, 512 keys, against the bf16 model",
    }
    # gate_up holds 46 % of the bytes, so the sum of the times grows by as much.
    share = LLADA.gemms[2].weights / LLADA.block_weights
    assert failed["LLaDA-8B linears, 32 rows, against cuBLAS bf16"].figure == pytest.approx(3 / (1 + share))
    assert (
        "LLaDA-8B qkv 512" in failed["fused element-wise kernels, of a copy of as many bytes, 512 rows and more"].note
    )


def test_a_wrong_or_missing_kernel_fails() -> None:
    sections = measured()
    sections["correctness"]["edges 0"]["wrong"] = {"linear w4a4 small": "3 of 9 wrong"}
    assert by_line(sections)["every kernel right"].outcome == "fail"
    sections = measured()
    del sections["correctness"]["edges 0"]["by_path"]["rotate naive"]
    assert "never ran: rotate naive" in by_line(sections)["every kernel right"].note
    sections = measured()
    del sections["correctness"]["edges 0"]["by_path"]["linear hopper"]
    assert "never ran: linear hopper" in by_line(sections)["every kernel right"].note
    assert (
        next(v for v in verdicts(sections, arch=89, complete=list(sections)) if v.line == "every kernel right").outcome
        == "pass"
    )


@pytest.mark.parametrize("name", ["block", "full 512"])
def test_a_slow_baseline_voids_its_ratios(name: str) -> None:
    sections = measured()
    sections["passes"]["Dream-7B star"]["passes"][name]["bf16"]["ms"] *= 1.4
    share, least = baseline_shares(sections, DREAM, "star")[name]
    assert share < least
    void = {line: verdict for line, verdict in by_line(sections).items() if verdict.outcome == "void"}
    described = "block pass, 32 rows, 512 keys" if name == "block" else "full 512 pass"
    expected = {f"Dream-7B star {described}, against the bf16 model"}
    loops = ["512, cached", "1024, cached"] if name == "block" else ["512, cached", "512, uncached"]
    assert set(void) == expected | {f"Dream-7B star complete loop, canvas {x}, against the bf16 model" for x in loops}
    assert all("too slow" in verdict.note for verdict in void.values())


def test_no_ratio_counts_without_ceilings() -> None:
    sections = measured()
    del sections["ceilings"]
    found = by_line(sections)
    assert found["LLaDA-8B star full 512 pass, against the bf16 model"].outcome == "void"
    assert found["LLaDA-8B linears, 32 rows, of bandwidth"].outcome == "waiting"


def test_what_did_not_fit_or_run_is_void() -> None:
    sections = measured()
    sections["passes"]["LLaDA-8B star"] = {"void": "needs 30000 MiB"}
    sections["loops"]["LLaDA-8B star"] = {"void": "needs 30000 MiB"}
    sections["sanitizer"]["racecheck"] = {"errors": None, "reason": "did not end"}
    found = by_line(sections)
    assert found["compute-sanitizer racecheck"].outcome == "void"
    assert found["LLaDA-8B star block pass, 32 rows, 512 keys, against the bf16 model"].note == "needs 30000 MiB"
    sections["sanitizer"]["memcheck"] = {"errors": 2, "checked": 9, "wrong": 0}
    assert by_line(sections)["compute-sanitizer memcheck"].outcome == "fail"


def test_a_part_of_the_rows_is_no_pass() -> None:
    sections = measured()
    found = {verdict.line: verdict for verdict in verdicts(sections, arch=90, complete=[])}
    assert found["every kernel right"].outcome == "waiting"
    assert {v.outcome for line, v in found.items() if line.startswith("fused")} == {"waiting"}
    sections["correctness"]["edges 0"]["wrong"] = {"linear w4a4 small": "3 of 9 wrong"}
    found = {verdict.line: verdict for verdict in verdicts(sections, arch=90, complete=[])}
    assert found["every kernel right"].outcome == "fail"


def test_nan_fails() -> None:
    sections = measured()
    sections["loops"]["LLaDA-8B star"]["canvas 512 cached"]["ratio"] = float("nan")
    line = "LLaDA-8B star complete loop, canvas 512, cached, against the bf16 model"
    assert by_line(sections)[line].outcome == "fail"


def test_the_page_of_results_says_what_waits() -> None:
    page = (RESULTS / "README.md").read_text(encoding="utf-8")
    written = RESULTS / "gpu.json"
    judged = (
        json.loads(written.read_text(encoding="utf-8"))["verdicts"] if written.exists() else [{"outcome": "waiting"}]
    )
    assert ("Waiting for a GPU" in page) == any(verdict["outcome"] == "waiting" for verdict in judged)
    bars = {verdict.bar for verdict in verdicts({}, arch=90, complete=[])} - {None}
    cells = {cell for line in page.splitlines() if line.startswith("|") for cell in re.findall(r"\d\.\d+", line)}
    missing = {f"{bar:g}" for bar in bars} - {f"{float(cell):g}" for cell in cells}
    assert not missing, f"bars that bench/results/README.md does not name: {missing}"
