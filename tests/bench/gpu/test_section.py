"""Sections go on where they stopped, and never mix results."""

import json
from collections.abc import Callable, Iterator

import pytest

from bench.gpu.section import Item, Plan, Section, measure, read_rows

Plans = Callable[..., Plan]


class _Counted:
    """A section of three items that says which ran."""

    def __init__(self, broken: str = "") -> None:
        self.ran: list[str] = []
        self.broken = broken

    def items(self, plan: Plan) -> Iterator[Item]:
        for key in ("a", "b", "c"):
            yield key, lambda key=key: self._run(key)

    def _run(self, key: str) -> dict[str, object]:
        if key == self.broken:
            raise KeyboardInterrupt
        self.ran.append(key)
        return {"value": key}

    def section(self) -> Section:
        return Section(name="counted", about="", items=self.items, said=str, slowest_s=1.0)


def test_every_item_is_measured_once(plan: Plans) -> None:
    counted = _Counted()
    assert measure(counted.section(), plan(), again=False)
    assert measure(counted.section(), plan(), again=False)
    assert counted.ran == ["a", "b", "c"]
    content = read_rows(plan().work, "counted")
    assert content["complete"]
    assert content["seed"] == 7
    assert content["rows"]["b"]["value"] == "b"
    assert measure(counted.section(), plan(), again=True)
    assert counted.ran == ["a", "b", "c"] * 2


def test_a_part_of_the_cases_is_not_complete(plan: Plans) -> None:
    assert measure(_Counted().section(), plan(every=3), again=False)
    assert not read_rows(plan().work, "counted")["complete"]


def test_an_interrupted_section_goes_on(plan: Plans) -> None:
    broken = _Counted(broken="b")
    with pytest.raises(KeyboardInterrupt):
        measure(broken.section(), plan(), again=False)
    assert not read_rows(plan().work, "counted")["complete"]
    whole = _Counted()
    assert measure(whole.section(), plan(), again=False)
    assert whole.ran == ["b", "c"]


def test_the_budget_ends_before_an_item(plan: Plans, capsys: pytest.CaptureFixture[str]) -> None:
    counted = _Counted()
    assert not measure(counted.section(), plan(seconds=0.5), again=False)
    assert counted.ran == []
    assert "the budget ends before a" in capsys.readouterr().out


def test_results_of_other_kernels_are_not_mixed_in(plan: Plans) -> None:
    counted = _Counted()
    measure(counted.section(), plan(), again=False)
    path = plan().work / "counted.json"
    content = json.loads(path.read_text())
    content["identity"]["kernels"] = "other"
    path.write_text(json.dumps(content))
    measure(counted.section(), plan(), again=False)
    assert counted.ran == ["a", "b", "c"] * 2


@pytest.mark.parametrize("text", ['{"complete": true, "rows": {"a": ', "[]", "{}", "\0", '{"rows": []}'])
def test_a_damaged_file_counts_as_empty(text: str, plan: Plans, capsys: pytest.CaptureFixture[str]) -> None:
    counted, path = _Counted(), plan().work / "counted.json"
    path.write_text(text)
    assert measure(counted.section(), plan(), again=False)
    assert f"{path} cannot be read and counts as empty: " in capsys.readouterr().out
    assert counted.ran == ["a", "b", "c"]
    assert read_rows(plan().work, "counted")["complete"]
