"""What "Quantization Meets dLLMs" (arXiv 2508.14896) found, beside what this study found.

A claim agrees when it holds for every model and format it speaks of, disagrees when it holds for none, and is mixed
between; where the study did not measure what it needs, it says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from pipeline.metrics.bootstrap import non_inferior, paired
from pipeline.study.grid import FULL, short_name
from pipeline.study.summary import MARGIN, Row, beats

SIGNIFICANT = 0.04  # the study's class for a drop of exact match that matters

Found = tuple[bool, str]  # whether it holds, and the figures


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One finding of the study: where it says so, and how it is checked on our rows."""

    text: str
    source: str
    check: Callable[[Sequence[Row]], Iterator[Found]]


def better(firsts: Sequence[str], second: str, bits: Sequence[str]) -> Callable[[Sequence[Row]], Iterator[Found]]:
    """Fewer bits a masked token than `second`, paired, at 95 %."""

    def check(rows: Sequence[Row]) -> Iterator[Found]:
        for a, b in _pairs(rows, firsts, second, bits):
            found = beats(a, b)
            figures = f"{found.difference:+.4f} bits [{found.low:+.4f}, {found.high:+.4f}]"
            yield found.high < 0, f"{_named(a)} against {b.method}: {figures}"

    return check


def not_worse(firsts: Sequence[str], second: str, bits: Sequence[str]) -> Callable[[Sequence[Row]], Iterator[Found]]:
    """Not more bits a masked token than `second` at 95 %."""

    def check(rows: Sequence[Row]) -> Iterator[Found]:
        for a, b in _pairs(rows, firsts, second, bits):
            found = beats(a, b)
            figures = f"{found.difference:+.4f} bits [{found.low:+.4f}, {found.high:+.4f}]"
            yield found.low <= 0, f"{_named(a)} against {b.method}: {figures}"

    return check


def lossless(rows: Sequence[Row]) -> Iterator[Found]:
    """W8A8: exact match not inferior by more than a point."""
    for row, full in _with_full(rows, "w8a8"):
        found = paired(full.sums["match"], row.sums["match"])
        figures = f"{100 * found.difference:+.1f} points [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"
        yield non_inferior(found, MARGIN, higher_is_better=True), f"{_named(row)}: {figures}"


def breaks(rows: Sequence[Row]) -> Iterator[Found]:
    """W3A16: exact match drops by what the study calls a significant drop."""
    for row, full in _with_full(rows, "w3a16"):
        drop = full.sums["match"].mean - row.sums["match"].mean
        yield drop > SIGNIFICANT, f"{_named(row)}: {-100 * drop:+.1f} points"


def fails(rows: Sequence[Row]) -> Iterator[Found]:
    """W4A4 without rotation: almost nothing is right."""
    for row, full in _with_full(rows, "w4a4"):
        if row.method == "smoothquant":
            share = row.sums["match"].mean / full.sums["match"].mean
            yield share < 0.1, f"{_named(row)}: {100 * row.sums['match'].mean:.1f} % right"


CLAIMS = (
    Claim(
        text="rotation beats SmoothQuant by far at W4A4",
        source="tables 2 to 4",
        check=better(("quarot", "duquant"), "smoothquant", ("w4a4",)),
    ),
    Claim(text="SmoothQuant fails at W4A4", source="tables 3, 4", check=fails),
    Claim(
        text="DuQuant is at least as good as QuaRot",
        source="tables 2 to 4",
        check=not_worse(("duquant",), "quarot", ("w4a4",)),
    ),
    Claim(
        text="GPTQ beats AWQ where only weights are quantised",
        source="tables 1, 5",
        check=better(("gptq",), "awq", ("w4a16", "w3a16")),
    ),
    Claim(text="W8A8 is nearly lossless for every method", source="tables 2 to 4", check=lossless),
    Claim(text="three-bit weights break what is generated", source="tables 3, 4", check=breaks),
)


def findings(rows: Sequence[Row]) -> list[dict[str, object]]:
    """Every claim with its verdict and figures."""
    measured = [row for row in rows if row.sums]
    table: list[dict[str, object]] = []
    for claim in CLAIMS:
        found = list(claim.check(measured))
        held = sum(holds for holds, _ in found)
        verdict = "not measured" if not found else _verdict(held, len(found))
        table.append(
            {
                "claim": claim.text,
                "source": claim.source,
                "verdict": verdict,
                "held": held,
                "of": len(found),
                "figures": [figures for _, figures in found],
            }
        )
    return table


def _verdict(held: int, count: int) -> str:
    return "agrees" if held == count else "disagrees" if held == 0 else "mixed"


def _pairs(rows: Sequence[Row], firsts: Sequence[str], second: str, bits: Sequence[str]) -> Iterator[tuple[Row, Row]]:
    """Rows of the two methods on the same model, bits and states."""
    for a in rows:
        for b in rows:
            alike = (a.model, a.bits, a.states) == (b.model, b.bits, b.states)
            if alike and a.method in firsts and b.method == second and a.bits in bits and "nll" in a.sums:
                yield a, b


def _with_full(rows: Sequence[Row], bits: str) -> Iterator[tuple[Row, Row]]:
    full = {row.model: row for row in rows if row.method == FULL}
    for row in rows:
        if row.bits == bits and "match" in row.sums:
            yield row, full[row.model]


def _named(row: Row) -> str:
    return " ".join(part for part in (short_name(row.model), row.method, row.bits, row.states) if part)
