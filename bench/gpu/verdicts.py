"""Every line that was promised, with its figure, its bar and whether it holds; nothing here measures anything.

pass, fail   the figure against the bar
void         measured, but not to be quoted: the bf16 baseline is too far from the device's ceilings
waiting      not measured
reported     a figure without a bar
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from bench.gpu.cases import all_cases
from bench.gpu.correctness import wrong_cases
from bench.gpu.quantized import METHODS
from bench.gpu.sanitizer import TOOLS
from bench.gpu.section import Row
from bench.gpu.shapes import BLOCK_KEYS, BLOCK_ROWS, CANVASES, DREAM, LLADA, MODELS, ModelShape

Sections = dict[str, dict[str, Row]]

BASELINE_OF_BANDWIDTH = 0.6
BASELINE_OF_PEAK = 0.7
GEMM_SMALL, GEMM_BANDWIDTH, GEMM_LARGE = 2.5, 0.65, 1.3
GEMM_LARGE_ROWS = (1024, 2048, 8192)
ELEMENTWISE = 0.8
BLOCK_PASS, FULL_PASS, LOOP = 2.5, 1.5, 1.69
# int8 head; int8 head and embedding. Dream's larger vocabulary allows 3.11 and 3.50 at most, so the bars are LLaDA's.
WEIGHTS = {"int8 head": 3.17, "int8 head and embedding": 3.53}
PEAK_FULL = {"int8 head": 2.9, "int8 head and embedding": 3.2}
PEAK_BLOCK = {"int8 head": 3.0, "int8 head and embedding": 3.35}


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One promised line."""

    line: str
    outcome: str
    figure: float | None = None
    bar: float | None = None
    note: str = ""

    def as_json(self) -> dict[str, Any]:
        """For the file of results."""
        return asdict(self)

    def __str__(self) -> str:
        figure = "-" if self.figure is None else f"{self.figure:.3g}"
        bar = "-" if self.bar is None else f"{self.bar:g}"
        return f"{self.outcome.upper():8} {self.line}: {figure} (bar {bar}){'; ' if self.note else ''}{self.note}"


def _at_least(line: str, figure: float, bar: float | None, note: str = "", void: str = "") -> Verdict:
    if void:
        return Verdict(line=line, outcome="void", figure=figure, bar=bar, note=void)
    outcome = "reported" if bar is None else "pass" if figure >= bar else "fail"
    return Verdict(line=line, outcome=outcome, figure=figure, bar=bar, note=note)


def _correctness(sections: Sections, arch: int, complete: bool) -> Iterator[Verdict]:
    line = "every kernel right"
    rows = sections.get("correctness", {})
    if not rows:
        yield Verdict(line=line, outcome="waiting")
        return
    wrong = wrong_cases(rows)
    ran = {path for row in rows.values() for path in row["by_path"]}
    wanted = {f"{case.op} {case.path}" for case in all_cases()} - (set() if arch == 90 else {"linear hopper"})
    missing = sorted(wanted - ran)
    note = f"{sum(row['checked'] for row in rows.values())} cases"
    if not wrong and not complete:
        yield Verdict(line=line, outcome="waiting", note=f"{note} right so far")
        return
    note += "".join(f"; WRONG {key}: {text}" for key, text in list(wrong.items())[:5])
    note += f"; never ran: {', '.join(missing)}" if missing else ""
    outcome = "fail" if wrong or missing else "pass"
    yield Verdict(line=line, outcome=outcome, figure=float(len(wrong)), bar=0.0, note=note)


def _sanitizer(sections: Sections) -> Iterator[Verdict]:
    for tool in TOOLS:
        row, line = sections.get("sanitizer", {}).get(tool), f"compute-sanitizer {tool}"
        if row is None:
            yield Verdict(line=line, outcome="waiting")
        elif row["errors"] is None:
            yield Verdict(line=line, outcome="void", note=row["reason"])
        else:
            outcome = "pass" if row["errors"] == 0 and row["wrong"] == 0 else "fail"
            note = f"{row['checked']} cases, {row['wrong']} wrong"
            yield Verdict(line=line, outcome=outcome, figure=float(row["errors"]), bar=0.0, note=note)


def _gemm_total(rows: dict[str, Row], shape: ModelShape, count: int) -> tuple[float, float, float] | None:
    """Summed over a block's linears: ms of bf16, ms of ours, bytes of weights. So each counts by what it moves."""
    chosen = [rows.get(f"{shape.name} {gemm.name} {count}") for gemm in shape.gemms]
    if any(row is None or "auto" not in row["contenders"] for row in chosen):
        return None
    bf16, ours = (sum(row["contenders"][name]["ms"] for row in chosen if row) for name in ("bf16", "auto"))
    return bf16, ours, sum(row["bytes"] for row in chosen if row)


def _gemm(sections: Sections, bandwidth: float | None) -> Iterator[Verdict]:
    rows = sections.get("gemm", {})
    for shape in MODELS:
        for count in (BLOCK_ROWS, *GEMM_LARGE_ROWS):
            bar = GEMM_SMALL if count == BLOCK_ROWS else GEMM_LARGE
            line = f"{shape.name} linears, {count} rows, against cuBLAS bf16"
            total = _gemm_total(rows, shape, count)
            yield (
                Verdict(line=line, outcome="waiting", bar=bar)
                if total is None
                else (_at_least(line, total[0] / total[1], bar))
            )
        line = f"{shape.name} linears, {BLOCK_ROWS} rows, of bandwidth"
        total = _gemm_total(rows, shape, BLOCK_ROWS)
        if total is None or bandwidth is None:
            yield Verdict(line=line, outcome="waiting", bar=GEMM_BANDWIDTH)
            continue
        bf16, ours, moved = total
        share, theirs = (size / (ms * 1e-3) / bandwidth for size, ms in ((moved, ours), (4 * moved, bf16)))
        yield _at_least(line, share, GEMM_BANDWIDTH, f"bf16 reaches {theirs:.2f}")


def _elementwise(sections: Sections, copy: float | None, complete: bool) -> Iterator[Verdict]:
    rows = sections.get("elementwise", {})
    large = {key: row for key, row in rows.items() if row["rows"] >= 512 and "auto" in row["bytes_per_s"]}
    shares: dict[str, Callable[[Row], float]] = {
        "of a copy of as many bytes, 512 rows and more": lambda row: (
            row["bytes_per_s"]["auto"] / max(row["bytes_per_s"]["copy"], row["bytes_per_s"]["negation"])
        )
    }
    shares["of the large copy, 8192 rows"] = lambda row: row["bytes_per_s"]["auto"] / copy if copy else 0.0
    for name, share in shares.items():
        line = f"fused element-wise kernels, {name}"
        chosen = {key: share(row) for key, row in large.items() if "8192" not in name or row["rows"] == 8192}
        if not chosen or not copy or not complete:
            yield Verdict(line=line, outcome="waiting", bar=ELEMENTWISE)
            continue
        worst = min(chosen, key=chosen.__getitem__)
        yield _at_least(line, chosen[worst], ELEMENTWISE, f"the least of {len(chosen)}: {worst}")


def baseline_shares(sections: Sections, shape: ModelShape, method: str) -> dict[str, tuple[float, float]]:
    """By pass: the bf16 model's share of the measured ceiling, and the least that lets a ratio count."""
    passes = sections.get("passes", {}).get(f"{shape.name} {method}", {}).get("passes", {})
    ceilings = sections.get("ceilings", {})
    if "bandwidth" not in ceilings or "products" not in ceilings:
        return {}
    found = {}
    for name, row in passes.items():
        seconds = row["bf16"]["ms"] * 1e-3
        if name == "block":
            share = shape.bytes_read(row["slots"], 2.0) / seconds / ceilings["bandwidth"]["bandwidth"]
            found[name] = share, BASELINE_OF_BANDWIDTH
        else:
            flops = shape.flops(row["rows"], row["slots"], row["head_rows"])
            found[name] = flops / seconds / ceilings["products"]["bf16_flops"], BASELINE_OF_PEAK
    return found


def _void(shares: dict[str, tuple[float, float]], *names: str) -> tuple[str, str]:
    """What to say of the baseline, and why a ratio against it is void (empty where it is not)."""
    said = ", ".join(f"{name} {shares[name][0]:.2f} of its ceiling" for name in names if name in shares)
    missing = [name for name in names if name not in shares]
    if missing:
        return said, f"the baseline's share is not measured: {', '.join(missing)}"
    low = [
        f"{name} {shares[name][0]:.2f}, needs {shares[name][1]:g}"
        for name in names
        if not shares[name][0] >= shares[name][1]
    ]
    return f"bf16 reaches {said}", f"the baseline is too slow: {'; '.join(low)}" if low else ""


def _passes(sections: Sections, shape: ModelShape, method: str) -> Iterator[Verdict]:
    name_of = f"{shape.name} {method}"
    row, shares = sections.get("passes", {}).get(name_of, {}), baseline_shares(sections, shape, method)
    bars = {"block": BLOCK_PASS} | {f"full {size}": FULL_PASS for size in CANVASES}
    for name, bar in bars.items():
        described = f"block pass, {BLOCK_ROWS} rows, {BLOCK_KEYS} keys" if name == "block" else f"{name} pass"
        line = f"{name_of} {described}, against the bf16 model"
        if "passes" not in row:
            yield Verdict(line=line, outcome="void" if "void" in row else "waiting", bar=bar, note=row.get("void", ""))
            continue
        found = row["passes"][name]
        note, void = _void(shares, name)
        spread = f"{found['ratio_min']:.2f} to {found['ratio_max']:.2f}; {note}"
        yield _at_least(line, found["ratio"], bar, spread, void)


def _loops(sections: Sections, shape: ModelShape, method: str) -> Iterator[Verdict]:
    name_of = f"{shape.name} {method}"
    row, shares = sections.get("loops", {}).get(name_of, {}), baseline_shares(sections, shape, method)
    for size in CANVASES:
        for kind in ("cached", "uncached"):
            line = f"{name_of} complete loop, canvas {size}, {kind}, against the bf16 model"
            found = row.get(f"canvas {size} {kind}")
            if found is None:
                outcome = "void" if "void" in row else "waiting"
                yield Verdict(line=line, outcome=outcome, bar=LOOP, note=row.get("void", ""))
                continue
            note, void = _void(shares, f"full {size}", *(("block",) if kind == "cached" else ()))
            rate = f"{found['ours']['tokens_per_s']:.0f} tokens/s against {found['bf16']['tokens_per_s']:.0f}"
            spread = f"{rate}, {found['ratio_min']:.2f} to {found['ratio_max']:.2f}; {note}"
            yield _at_least(line, found["ratio"], LOOP, spread, void)


def _memory(sections: Sections, shape: ModelShape, method: str) -> Iterator[Verdict]:
    row = sections.get("passes", {}).get(f"{shape.name} {method}", {})
    for form in WEIGHTS:
        line = f"{shape.name} {method}, {form}: "
        bars = {"weights": WEIGHTS[form], **{f"peak, full {size} pass": PEAK_FULL[form] for size in CANVASES}}
        bars["peak, block pass"] = PEAK_BLOCK[form]
        for what, bar in bars.items():
            chosen = bar if shape is LLADA else None
            if "weight_bytes" not in row:
                yield Verdict(line=line + what, outcome="waiting", bar=chosen)
                continue
            if what == "weights":
                ratio = row["weight_bytes"]["bf16"] / row["weight_bytes"][form]
            else:
                case = what.removeprefix("peak, ").removesuffix(" pass")
                ratio = row["peak_bytes"]["bf16"][case] / row["peak_bytes"][form][case]
            yield _at_least(line + what, ratio, chosen)


def verdicts(sections: Sections, arch: int, complete: Collection[str]) -> list[Verdict]:
    """Every promised line, from the rows of the sections; `complete` names those that miss no row."""
    ceilings = sections.get("ceilings", {}).get("bandwidth")
    found = [*_correctness(sections, arch, "correctness" in complete), *_sanitizer(sections)]
    found += _gemm(sections, ceilings["bandwidth"] if ceilings else None)
    found += _elementwise(sections, ceilings["copy"] if ceilings else None, "elementwise" in complete)
    measured = {key.split()[-1] for name in ("passes", "loops") for key in sections.get(name, {})}
    for method in METHODS:
        if method == METHODS[0] or method in measured:
            for shape in (LLADA, DREAM):
                for judge in (_passes, _loops, _memory):
                    found += judge(sections, shape, method)
    return found
