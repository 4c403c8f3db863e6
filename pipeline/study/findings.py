"""What "Quantization Meets dLLMs" (arXiv 2508.14896) found, beside what this study found.

Each figure that a claim speaks of holds, does not, or is not settled: then its 95 % interval has room for both. A claim
agrees when it holds for every model and format it speaks of, disagrees when it holds for none, and is mixed between;
it is not settled where nothing contradicts it but not all is sure, and not measured where the study has no figures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from pipeline.metrics.bootstrap import ROUNDING, Interval, non_inferior, paired
from pipeline.recipe import LinearFormat
from pipeline.study.grid import FULL, short_name
from pipeline.study.summary import MARGIN, Row, beats

SIGNIFICANT = 0.04  # the study's class for a drop that matters, as a share of full precision
ALMOST_ALL = 0.9  # of what was right is wrong: tables 3 and 4 have drops of 95 to 100 %
KNOWS = 0.2  # share of right answers at full precision below which a model says nothing of exact match
ALIKE = 0.05  # of the other method's loss against full precision: differences below are none that matter

# Each claim's answer for one pair of rows: whether it holds, None where that is not settled, the figures, the rows.
Found = tuple[bool | None, str, tuple[Row, ...]]
Check = Callable[[Sequence[Row]], Iterator[Found]]


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One finding: where the study says so, how it is checked on our rows, and what we judge it by."""

    text: str
    source: str
    check: Check
    judged: str


def better(firsts: Sequence[str], second: str, bits: Sequence[str]) -> Check:
    """Fewer bits a masked token than `second`; not so where any gain is surely too small to matter."""

    def check(rows: Sequence[Row]) -> Iterator[Found]:
        for a, b, margin in _pairs(rows, firsts, second, bits):
            found = beats(a, b)
            yield _settled(found.high < 0, found.low > -margin), _bits(a, b, found), (a, b)

    return check


def not_worse(firsts: Sequence[str], second: str, bits: Sequence[str]) -> Check:
    """Surely not more bits a masked token than `second` by what matters."""

    def check(rows: Sequence[Row]) -> Iterator[Found]:
        for a, b, margin in _pairs(rows, firsts, second, bits):
            found = beats(a, b)
            yield _settled(found.high <= margin, found.low > 0), _bits(a, b, found), (a, b)

    return check


def lossless(methods: Sequence[str] | None, bits: str) -> Check:
    """Exact match not inferior by more than a point."""

    def check(rows: Sequence[Row]) -> Iterator[Found]:
        for row, full in _with_full(rows, bits):
            if methods is None or row.method in methods:
                found = paired(full.sums["match"], row.sums["match"])
                figures = f"{100 * found.difference:+.1f} points [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"
                holds = non_inferior(found, MARGIN, higher_is_better=True)
                yield _settled(holds, found.high < -MARGIN - ROUNDING), f"{_named(row)}: {figures}", (row,)

    return check


def drops(methods: Sequence[str] | None, bits: str, least: float) -> Check:
    """Exact match falls by more than `least` of what full precision has."""

    def check(rows: Sequence[Row]) -> Iterator[Found]:
        for row, full in _with_full(rows, bits):
            if methods is None or row.method in methods:
                found, whole = paired(full.sums["match"], row.sums["match"]), full.mean("match")
                change, low, high = (each / whole for each in (found.difference, found.low, found.high))
                figures = f"{100 * change:+.1f} % [{100 * low:+.1f}, {100 * high:+.1f}]"
                yield _settled(high < -least, low >= -least), f"{_named(row)}: {figures}", (row,)

    return check


BY_BITS = "by bits a masked token, the study by accuracy of tasks"
BY_MATCH = "by exact match on our problems, the study by GSM8K, MATH, HumanEval and MBPP"

CLAIMS = (
    Claim(
        text="rotation beats SmoothQuant at W4A4",
        source="tables 2 to 4",
        check=better(("quarot", "duquant"), "smoothquant", ("w4a4",)),
        judged=BY_BITS,
    ),
    Claim(
        text="SmoothQuant fails at W4A4: more than 90 % is lost",
        source="tables 3, 4",
        check=drops(("smoothquant",), "w4a4", ALMOST_ALL),
        judged=BY_MATCH,
    ),
    Claim(
        text="DuQuant is at least as good as QuaRot",
        source="tables 2 to 4",
        check=not_worse(("duquant",), "quarot", ("w4a4",)),
        judged=BY_BITS,
    ),
    Claim(
        text="GPTQ beats AWQ where only weights are quantised",
        source="tables 1, 5; tables 3, 4 have AWQ above in 10 of 16 places",
        check=better(("gptq",), "awq", ("w4a16", "w3a16")),
        judged=BY_BITS,
    ),
    Claim(
        text="GPTQ W4A16 is within a point of full precision",
        source="tables 1, 3 to 5: +0.3 to -6.4 % of full precision",
        check=lossless(("gptq",), "w4a16"),
        judged=BY_MATCH,
    ),
    Claim(
        text="W8A8 is within a point of full precision for every method",
        source="tables 2 to 4, for SmoothQuant, QuaRot and DuQuant",
        check=lossless(None, "w8a8"),
        judged=BY_MATCH,
    ),
    Claim(
        text="three-bit weights lose more than 4 % of what is generated",
        source="tables 3, 4",
        check=drops(None, "w3a16", SIGNIFICANT),
        judged=BY_MATCH,
    ),
)

# The study's setting of each method: its grids, the options it names, and what it rounds of attention, which is also at
# the bits of the activations.
PER_GROUP, PER_ROW = "weights asymmetric in groups of 128", "activations {0} per token, weights {0} per channel"
STUDY_GRIDS = {
    "gptq": PER_GROUP,
    "awq": PER_GROUP,
    "smoothquant": PER_ROW.format("asymmetric"),
    "quarot": PER_ROW.format("symmetric"),
    "duquant": PER_ROW.format("asymmetric"),
}
STUDY_OPTIONS: dict[str, dict[str, object]] = {
    "gptq": {"damping": 0.01, "act_order": False},
    "awq": {"grid": 20, "clip": True, "min_clip": 0.5},
    "smoothquant": {"alpha": 0.5},
    "quarot": {"weights": "gptq", "clip_weights": True},
    "duquant": {"alpha": 0.5, "block": 128, "steps": 256, "a_clip": 0.9, "w_clip": 0.8, "weights": "rtn"},
}
STUDY_ATTENTION = {"smoothquant": "Q, K and V", "quarot": "K and V", "duquant": "Q, K and V"}
WEIGHT_ONLY = ("gptq", "awq")


def findings(rows: Sequence[Row]) -> list[dict[str, object]]:
    """Every claim with its verdict and figures, and what differs from the study's setting; variants are left out."""
    measured = [row for row in rows if row.sums and not row.variant]
    table: list[dict[str, object]] = []
    for claim in CLAIMS:
        found = list(claim.check(measured))
        answers = [holds for holds, _, _ in found]
        table.append(
            {
                "claim": claim.text,
                "source": claim.source,
                "verdict": _verdict(answers),
                "held": answers.count(True),
                "open": answers.count(None),
                "of": len(answers),
                "figures": [figures for _, figures, _ in found],
                "why": [claim.judged, *_differing([row for _, _, pair in found for row in pair])] if found else [],
            }
        )
    return table


def _verdict(answers: Sequence[bool | None]) -> str:
    if not answers:
        return "not measured"
    if True in answers and False in answers:
        return "mixed"
    if None in answers:
        return "not settled"
    return "agrees" if answers[0] else "disagrees"


def _settled(holds: bool, fails: bool) -> bool | None:
    return True if holds else False if fails else None


def _bits(a: Row, b: Row, found: Interval) -> str:
    figures = f"{found.difference:+.4f} bits [{found.low:+.4f}, {found.high:+.4f}]"
    return f"{_named(a)} against {b.method}: {figures}"


def _pairs(
    rows: Sequence[Row], firsts: Sequence[str], second: str, bits: Sequence[str]
) -> Iterator[tuple[Row, Row, float]]:
    """Rows of the two methods on the same model, bits and states, and the difference in bits that matters."""
    full = {row.model: row for row in rows if row.method == FULL}
    for a in rows:
        for b in rows:
            alike = (a.model, a.bits, a.states) == (b.model, b.bits, b.states)
            if alike and a.method in firsts and b.method == second and a.bits in bits and "nll" in a.sums:
                yield a, b, ALIKE * max(0.0, b.mean("nll") - full[b.model].mean("nll"))


def _with_full(rows: Sequence[Row], bits: str) -> Iterator[tuple[Row, Row]]:
    """Rows with exact match beside full precision, of models that have something to lose."""
    full = {row.model: row for row in rows if row.method == FULL}
    for row in rows:
        if row.bits == bits and "match" in row.sums and full[row.model].mean("match") >= KNOWS:
            yield row, full[row.model]


def _named(row: Row) -> str:
    return " ".join(part for part in (short_name(row.model), row.method, row.bits, row.states) if part)


def _differing(rows: Sequence[Row]) -> list[str]:
    """Each difference of setting once, with the rows that it is of where it is not of all."""
    of: dict[str, dict[str, None]] = {}
    every = dict.fromkeys(f"{row.method} {row.bits}" for row in rows)
    for row in rows:
        for difference in differences(row):
            of.setdefault(difference, {})[f"{row.method} {row.bits}"] = None
    return [difference if names == every else f"{', '.join(names)}: {difference}" for difference, names in of.items()]


def differences(row: Row) -> list[str]:
    """Where the setting of a row is not the study's, in words; empty without a recipe."""
    recipe = row.recipe
    if recipe is None:
        return []
    method, bits, attention = recipe.method, recipe.linear.a_bits, recipe.attention
    ours, found = _grids(recipe.linear), []
    if method not in STUDY_GRIDS or (method in WEIGHT_ONLY) != (bits == 16):
        found.append(f"{ours}; not in the study")
    else:
        theirs = STUDY_GRIDS[method]
        found.append(f"{ours}, as the study's" if ours == theirs else f"{ours}; the study's {theirs}")
        used = recipe.model_dump(mode="json")[method]
        other = {name: value for name, value in STUDY_OPTIONS[method].items() if used[name] != value}
        found += [f"{method}.{name} {used[name]}, the study's {value}" for name, value in other.items()]
    if method in STUDY_ATTENTION and (attention.k_bits, attention.v_bits) != (bits, bits):
        operands = f"K at {attention.k_bits} and V at {attention.v_bits} bits"
        found.append(f"attention with {operands}, the study's {STUDY_ATTENTION[method]} at {bits}")
    if recipe.head.bits < 16:
        found.append(f"LM head at {recipe.head.bits} bits, the study's at 16")
    if row.states:
        part = recipe.calibration
        text = f"{part.samples} {part.states} canvases of {part.source.partition(':')[0]} text"
        found.append(f"calibrated on {text}, the study on 128 of clean text")
    return found


def _grids(linear: LinearFormat) -> str:
    words = []
    if linear.a_bits < 16:
        words.append(f"activations {_symmetry(linear.symmetric)} {_granularity(linear.a_group, 'per token')}")
    words.append(f"weights {_symmetry(linear.w_symmetric)} {_granularity(linear.w_group, 'per channel')}")
    return ", ".join(words)


def _symmetry(symmetric: bool) -> str:
    return "symmetric" if symmetric else "asymmetric"


def _granularity(group: int, whole: str) -> str:
    return f"in groups of {group}" if group else whole
