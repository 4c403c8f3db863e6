"""The page and the pictures of a study hold every row and are the same for the same figures."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from pipeline.study import plots
from pipeline.study.findings import findings
from pipeline.study.grid import Cell
from pipeline.study.subject import Sizes
from pipeline.study.summary import as_table, rows
from pipeline.study.table import AGAINST_FIRST, COLUMNS, markdown
from tests.pipeline.study.outcomes import full, measured

PICTURES = ["nll.png", "trajectory.png", "steps.png"]
CELLS = [
    full("builtin:a"),
    measured("gptq", nll=0.2, right=0.95, model="builtin:a"),
    measured("awq", nll=0.3, right=0.5, model="builtin:a"),
]
IMPOSSIBLE = [(Cell(model="builtin:a", method="quarot", bits="w4a16", states="noised"), "cannot | do\nthat")]


def page(cells: list[Any] = CELLS, impossible: list[Any] = IMPOSSIBLE) -> dict[str, Any]:
    found = rows(cells, impossible)
    return {
        "rows": as_table(found),
        "findings": findings(found),
        "sizes": asdict(Sizes()),
        "threads": 3,
        "task": "items.jsonl",
        "made_with": {"torch": "2"},
    }


def table_rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_every_row_stands_in_the_table() -> None:
    text = markdown(page(), ["nll.png"])
    lines = table_rows(text)
    head = lines[0]
    assert head == ["bits", "method", "states", "seeds", "rank", *COLUMNS]
    by_method = {line[1]: dict(zip(head, line, strict=True)) for line in lines[2:5]}
    assert list(by_method) == ["full", "gptq", "awq"]
    assert by_method["full"]["exact match %"] == "100.0"
    assert by_method["full"]["argmax agrees"] == ""
    assert by_method["gptq"]["exact match %"].startswith("95.0 (-5.0 [-")
    assert by_method["gptq"]["exact match %"].endswith("!")
    assert by_method["gptq"]["bits a masked token"].endswith("(+0.1000 [+0.1000, +0.1000])")
    assert (by_method["gptq"]["rank"], by_method["awq"]["rank"]) == ("1", "2")
    assert by_method["awq"]["argmax agrees"] == "75.00 % [75.00, 75.00]"
    assert by_method["awq"]["same answers"].startswith("50.00 % [3")
    assert by_method["gptq"]["steps before they part"].startswith("95.00 % [")
    assert ["w4a4", "awq", "noised", "100.0", "0.0"] in lines
    assert "- builtin:a quarot w4a16 noised: cannot \\| do that" in text
    assert "![nll.png](nll.png)" in text
    assert text == markdown(page(), ["nll.png"])


def test_variants_stand_beside_their_method_and_against_the_first() -> None:
    cells = [full(), measured("quarot", nll=0.4)]
    cells += [measured("star", nll=nll, variant=name) for name, nll in (("whole", 0.2), ("no | TAC", 0.3))]
    impossible = [(Cell(model="m", method="star", bits="w8a8", states="noised", variant="other"), "why")]
    text = markdown(page(cells, impossible), [])
    lines = table_rows(text)
    assert [line[1] for line in lines[2:6]] == ["full", "quarot", "star, whole", "star, no \\| TAC"]
    own = text.partition("Against whole, paired:")[2]
    head, _, quarot, bare = table_rows(own)[:4]
    assert head == ["bits", "method", "states", *AGAINST_FIRST]
    found = dict(zip(head, bare, strict=True))
    assert (quarot[1], found["method"]) == ("quarot", "star, no \\| TAC")
    assert found["bits a masked token"] == "+0.1000 [+0.1000, +0.1000]"
    assert found["exact match, points"] == "+0.0 [+0.0, +0.0]"
    assert "- m star, other w8a8 noised: why" in text
    assert "Against" not in markdown(page(), [])


def test_variants_are_drawn_by_name(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    cells = [full(), *(measured("star", variant=f"number {n}") for n in range(12))]
    lines = as_table(rows(cells, []))
    series = plots._series(lines)
    assert "star, number 3 noised" in series
    assert len({tuple(style.values()) for style in series.values()}) == 13
    assert plots.draw(lines, tmp_path) == PICTURES


def test_seeds_are_shown_from_the_least_to_the_most() -> None:
    cells = [full(), *(measured("gptq", seed=seed, nll=nll, right=0.5) for seed, nll in enumerate((0.3, 0.2, 0.4)))]
    found = dict(zip(*(table_rows(markdown(page(cells, []), []))[at] for at in (0, 3)), strict=True))
    assert (found["method"], found["seeds"]) == ("gptq", "3")
    assert found["bits a masked token"].endswith(") 0.2002..0.3994")
    assert found["exact match %"].endswith("! 50.0..50.0")


def test_a_finding_has_a_line_for_every_figure_and_what_it_was_made_with_is_told() -> None:
    more = [measured(method, "w8a8", model="builtin:a") for method in ("rtn", "awq")]
    text = markdown(page([*CELLS, *more], []), [])
    line = next(line for line in table_rows(text) if line[0].startswith("W8A8"))
    assert line[2:4] == ["agrees", "2 of 2"]
    assert line[4] == "a rtn w8a8 noised: +0.0 points [+0.0, +0.0]<br>a awq w8a8 noised: +0.0 points [+0.0, +0.0]"
    assert line[5].startswith("by exact match on our problems")
    assert text.endswith("Threads of a cell: 3.\n\ntorch 2.\n")


def test_columns_of_tasks_that_were_not_asked_for_are_left_out() -> None:
    cells = [full(), measured("gptq")]
    for _, found in cells:
        found["tasks"] = {"nll": found["tasks"]["nll"]}
    text = markdown(page(cells, []), [])
    assert table_rows(text)[0] == ["bits", "method", "states", "seeds", "rank", "bits a masked token"]
    assert "Exact match by kind" not in text
    assert "Not possible" not in text


def test_every_table_has_one_width() -> None:
    text = markdown(page(), [])
    for block in text.split("\n\n"):
        if block.startswith("|"):
            widths = {line.replace("\\|", "").count("|") for line in block.splitlines()}
            assert len(widths) == 1, block


def test_pictures_are_the_same_for_the_same_figures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    lines = as_table(rows(CELLS, IMPOSSIBLE))
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        assert plots.draw(lines, tmp_path / name) == PICTURES
    for name in PICTURES:
        first, second = ((tmp_path / folder / name).read_bytes() for folder in ("one", "two"))
        assert first.startswith(b"\x89PNG")
        assert first == second


def test_a_mean_beside_its_interval_is_drawn(tmp_path: Path) -> None:
    """As rounding leaves it where all samples are alike."""
    pytest.importorskip("matplotlib")
    lines = as_table(rows(CELLS, []))
    lines[1]["measured"]["nll"]["against_full"] |= {"low": 0.11, "high": 0.12, "difference": 0.1}
    lines[2]["measured"]["nll"]["against_full"] |= {"low": 0.08, "high": 0.09, "difference": 0.1}
    assert "nll.png" in plots.draw(lines, tmp_path)


def test_pictures_without_figures_are_not_there(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "nll.png").write_bytes(b"of an earlier study")
    assert plots.draw(as_table(rows([full()], [])), tmp_path) == []
    assert list(tmp_path.iterdir()) == []
