"""Calibration text: which sources there are, what a file may hold, what is refused and where it says so."""

import builtins
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.calibration import sources
from pipeline.calibration.sources import check_source, source_digest, texts
from pipeline.errors import EnvironmentFault, InputRefused, UsageFault
from pipeline.recipe_file import load_recipe

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def read(path: Path, content: str | bytes) -> list[tuple[str | None, str]]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return [(text.prompt, text.answer) for text in texts(f"file:{path}")]


@pytest.mark.parametrize(
    "source",
    [
        "builtin",
        "file:a b.txt",
        "file:C:x",
        f"hf:name@{COMMIT}",
        f"hf:own/na.me_1@{COMMIT}:test",
        f"hf:own/name/plain-v1@{COMMIT}:train:text",
        f"hf:own/name@{COMMIT}:train:question+answer",
    ],
)
def test_known_sources_are_accepted(source: str) -> None:
    assert load_recipe("rtn-w4a4", [f"calibration.source={source!r}"]).calibration.source == source


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("wikitext", "'wikitext' is no source of text; expected builtin, file:PATH or hf:NAME@COMMIT"),
        ("file:", "'file:' is no source of text"),
        ("builtin:x", "'builtin:x' is no source of text"),
        ("hf:own/name", "names no dataset; expected hf:OWNER/NAME"),
        ("hf:own/name@main", "a branch would not give the same text twice"),
        (f"hf:own/name@{COMMIT}:train:a+b+c", "names no dataset"),
        (f"hf:/etc/name@{COMMIT}", "names no dataset"),
    ],
)
def test_other_sources_are_usage_errors(source: str, message: str) -> None:
    with pytest.raises(UsageFault, match=re.escape(message)):
        load_recipe("rtn-w4a4", [f"calibration.source={source!r}"])


@given(st.text(max_size=40))
def test_any_source_is_accepted_or_refused_in_words(source: str) -> None:
    try:
        assert check_source(source) == source
    except ValueError as fault:
        assert "expected" in str(fault)


def test_blank_lines_part_paragraphs_and_else_lines_are_texts(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    assert read(path, "one\ntwo \n\n \n\nthree\n") == [(None, "one\ntwo"), (None, "three")]
    assert read(path, "one\r\ntwo\r\n\r\nthree\r\n") == [(None, "one\ntwo"), (None, "three")]
    assert read(path, "one\ntwo\n \t\nthree") == [(None, "one\ntwo"), (None, "three")]
    assert read(path, "one\ntwo\n") == [(None, "one"), (None, "two")]
    assert read(path, "\n\none\ntwo\n\n") == [(None, "one"), (None, "two")]
    assert read(path, "\ufeffone\r\ntwo") == [(None, "one"), (None, "two")]
    assert read(path, "") == read(path, " \n\n\t") == []
    assert [text.where for text in texts(f"file:{path}")] == []


@given(st.lists(st.text(st.characters(exclude_categories=("C", "Z")), min_size=1, max_size=9), max_size=6))
def test_paragraphs_come_back(parts: list[str]) -> None:
    """Whatever is between the blank lines."""
    content = "\n\n".join(f"{part}\n{part}" for part in parts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "_content", lambda _: content.encode())
        found = [text.answer for text in texts("file:x.txt")]
    assert found == ([f"{part}\n{part}" for part in parts] if len(parts) != 1 else parts * 2)


def test_json_lines_hold_texts_or_pairs(tmp_path: Path) -> None:
    path = tmp_path / "text.JSONL"
    found = read(path, '{"text": "a\\nb"}\n{"prompt": "p", "answer": "q", "kind": "x"}\n\n')
    assert found == [(None, "a\nb"), ("p", "q")]
    assert read(path, "\n") == []
    assert [text.where for text in texts(f"file:{path}")] == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ("[" * 100_000, "line 2 is not JSON"),
        ("", "line 2 is not JSON"),
        ("[1]", "line 2: expected an object"),
        ('{"prompt": "p"}', "line 2: expected an object"),
        (
            '{"text": "t", "answer": "a"}',
            'expected an object {"text"} or {"prompt", "answer"}; found one with answer, t',
        ),
        ('{"other": "t"}', "found one with neither"),
        ('{"text": 3}', "line 2: text is '3'; expected text"),
        ('{"prompt": null, "answer": "a"}', "line 2: prompt is 'None'; expected text"),
        ('{"text": "\\ud800"}', "line 2: text holds half a surrogate pair"),
    ],
)
def test_a_bad_line_is_refused_by_its_number(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(InputRefused, match=re.escape(message)):
        read(tmp_path / "text.jsonl", f'{{"text": "a"}}\n{line}\n{{"text": "a"}}')


def test_unreadable_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputRefused, match="found nothing, expected a file of text"):
        list(texts(f"file:{tmp_path / 'none.txt'}"))
    with pytest.raises(InputRefused, match="found a folder"):
        list(texts(f"file:{tmp_path}"))
    with pytest.raises(InputRefused, match="cannot be opened: File name too long"):
        list(texts("file:" + "a" * 5000))
    with pytest.raises(InputRefused, match="is not UTF-8: byte 1 is wrong"):
        read(tmp_path / "text.txt", b"a\xff")
    monkeypatch.setattr(sources, "MAX_BYTES", 4)
    assert read(tmp_path / "text.txt", "abcd") == [(None, "abcd")]
    with pytest.raises(InputRefused, match="has more than 0 MiB"):
        read(tmp_path / "text.txt", "abcde")


def test_the_content_of_a_file_is_part_of_its_source(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("one")
    first = source_digest(f"file:{path}")
    path.write_text("two")
    assert len({first, source_digest(f"file:{path}"), source_digest("builtin")}) == 3
    assert source_digest(f"hf:x@{COMMIT}") == source_digest("builtin")


class Datasets(ModuleType):
    """Stands in for the package: one streamed split of these records."""

    def __init__(self, records: list[dict[str, Any]], fault: Exception | None = None) -> None:
        super().__init__("datasets")
        self.records, self.fault = records, fault
        self.asked: list[tuple[Any, ...]] = []

    def load_dataset(self, *names: str, **options: Any) -> Iterator[dict[str, Any]]:
        self.asked.append((*names, options))
        if self.fault is not None:
            raise self.fault
        return iter(self.records)


def hub(patch: pytest.MonkeyPatch, records: list[dict[str, Any]], fault: Exception | None = None) -> Datasets:
    module = Datasets(records, fault)
    patch.setitem(sys.modules, "datasets", module)
    return module


def test_a_dataset_is_streamed_at_its_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    module = hub(monkeypatch, [{"text": "a", "q": "p", "r": "s"}, {"text": "", "q": "t", "r": "u"}])
    plain = [(text.prompt, text.answer, text.where) for text in texts(f"hf:own/name@{COMMIT}")]
    assert plain == [(None, "a", "own/name train record 0"), (None, "", "own/name train record 1")]
    pairs = [(text.prompt, text.answer) for text in texts(f"hf:own/name/part@{COMMIT}:test:q+r")]
    assert pairs == [("p", "s"), ("t", "u")]
    same = {"revision": COMMIT, "streaming": True}
    assert module.asked == [("own/name", {"split": "train", **same}), ("own/name", "part", {"split": "test", **same})]
    monkeypatch.setattr(sources, "MAX_RECORDS", 1)
    assert len(list(texts(f"hf:own/name@{COMMIT}"))) == 1


def test_a_dataset_is_read_as_far_as_a_file_may_be_long(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In bytes, so that neither empty records nor long ones decide how much text there is."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sources, "MAX_BYTES", 9)
    hub(monkeypatch, [{"text": text} for text in ("", "abc", "", "äöü", "x", "y")])
    assert [text.answer for text in texts(f"hf:own/name@{COMMIT}")] == ["", "abc", "", "äöü"]


def test_what_a_dataset_lacks_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    hub(monkeypatch, [{"line": "a", "text": 3}])
    with pytest.raises(InputRefused, match="record 0 has no field 'words'; it has line, text"):
        list(texts(f"hf:name@{COMMIT}:train:words"))
    with pytest.raises(InputRefused, match="record 0: text is '3'; expected text"):
        list(texts(f"hf:name@{COMMIT}"))
    hub(monkeypatch, [], ConnectionError("no\n network"))
    with pytest.raises(EnvironmentFault, match="cannot be read: ConnectionError: no network; check name"):
        list(texts(f"hf:name@{COMMIT}"))
    (tmp_path / "name").mkdir()
    with pytest.raises(InputRefused, match="name is a folder here"):
        list(texts(f"hf:name@{COMMIT}"))


def test_the_extra_is_named_where_the_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *rest: Any) -> Any:
        if name == "datasets":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(EnvironmentFault, match=re.escape("pip install 'dllmc[hf]'")):
        list(texts(f"hf:name@{COMMIT}"))
