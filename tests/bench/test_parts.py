"""The parts of the benches ask for what the recipes can do, and their results keep what pages need."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench import parts, star, study
from bench.parts import Part, coarse, measure_parts
from pipeline.quantize import check_format
from pipeline.recipe_file import BUILTIN_RECIPES, load_recipe
from pipeline.study.grid import FULL, Variant
from pipeline.study.run import make_plan
from pipeline.study.subject import Sizes

ALL = [("study", name, part) for name, part in study.PARTS.items()] + [
    ("star", name, part) for name, part in star.PARTS.items()
]
MODEL = "builtin:tiny-llada"


def with_recipes(part: Part) -> bool:
    return all(variant.recipe in BUILTIN_RECIPES for variant in part.variants.values())


@pytest.mark.parametrize(("bench", "name", "part"), [each for each in ALL if with_recipes(each[2])])
def test_a_part_has_a_cell_for_every_row(bench: str, name: str, part: Part) -> None:
    request = part.request()
    request.grid.check()
    cells = [cell for cell in request.grid.cells(MODEL) if cell.method != FULL]
    assert len({(cell.method, cell.bits, cell.variant, cell.seed) for cell in cells}) == len(cells)
    for cell in cells:
        recipe = request.grid.recipe(cell)
        if cell.variant:
            check_format(recipe)
    assert {cell.variant for cell in cells} - {""} == part.variants.keys()


@pytest.mark.parametrize("name", star.PARTS)
def test_every_change_is_one_of_its_recipe(name: str) -> None:
    variants = star.PARTS[name].variants
    first, *others = variants.values()
    whole = load_recipe("star-w4a4", list(first.sets))
    for variant in others:
        if variant.recipe == first.recipe == star.PAPER:
            assert load_recipe("star-w4a4", list(variant.sets)) != whole


def test_only_figures_of_rows_are_kept() -> None:
    names = ("nll", "nll.3", "match", "match.add", "choice", "choice.add", "free", "free_mse.12", "forced_tokens.1")
    row: dict[str, Any] = {"method": "gptq", "measured": dict.fromkeys(names, 0)}
    assert list(coarse(row)["measured"]) == ["nll", "match", "match.add", "choice", "free"]
    assert coarse({"reason": "why"}) == {"reason": "why"}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Part]:
    """Two parts of one cell each, measured by nobody."""
    part = Part(
        why="Why",
        variants={"whole": Variant(recipe="rtn-w4a4"), "wide": Variant(recipe="rtn-w4a4", sets=("head.bits=16",))},
        tasks=("nll",),
        sizes=Sizes(tokens=60),
    )
    monkeypatch.setattr(parts, "RESULTS", tmp_path)
    monkeypatch.setattr(parts, "write_result", lambda name, found: (tmp_path / name).write_text(json.dumps(found)))
    return {"one": part, "two": replace(part, steps=True)}


def test_parts_that_were_not_asked_for_stay_where_they_are(
    small: dict[str, Part], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    line: dict[str, Any] = {"model": MODEL, "method": "rtn", "bits": "w4a4", "states": "", "seeds": 1, "rank": 1}
    line["measured"] = {"free.1": {"mean": 1.0}}

    def measured(request: Any, folder: Path, **_: object) -> dict[str, Any]:
        asked.append(folder.name)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "study.json").touch()
        plan = make_plan(request)
        assert [order.cell.variant for order in plan.orders[:3]] == ["", "whole", "wide"]
        return {
            "rows": [line],
            "findings": [],
            "sizes": {},
            "made_with": {},
            "threads": 1,
            "task": "built-in problems",
        }

    monkeypatch.setattr(parts, "study", measured)
    for words, expected in ((["--parts", "two"], ["two"]), (["--parts", "one"], ["one", "two"]), ([], ["one", "two"])):
        asked.clear()
        monkeypatch.setattr("sys.argv", ["bench", "-o", str(tmp_path / "out"), *words])
        assert measure_parts("found", small, None) == tmp_path / "out"
        assert asked == expected
    found = json.loads((tmp_path / "found").read_text())
    assert {name: part["rows"][0]["measured"] for name, part in found.items()} == {"one": {}, "two": line["measured"]}
    assert (tmp_path / "found.md").read_text().startswith("# Why\n\n# Study")
