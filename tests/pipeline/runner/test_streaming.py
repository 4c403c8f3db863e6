"""A growing answer as text: its pieces join up to the final text and are never taken back."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.runner.streaming import Speech, cut, held_back

EOS = 256


def decode(ids):
    """One byte an id."""
    return bytes(ids).decode(errors="replace")


def pieces_of(ids, borders, stops=()):
    """Pieces of a stream whose blocks end at the borders, and the final text."""
    speech = Speech(decode, eos_id=EOS, stops=stops)
    edges = sorted({0, len(ids), *(border for border in borders if border < len(ids))})
    said = [speech.add(ids[start:stop]) for start, stop in itertools.pairwise(edges)]
    ended = ids[: ids.index(EOS)] if EOS in ids else ids
    text = cut(decode(ended), stops)
    return [*said, speech.end(text)], text


@given(st.text("abc\u00e9\u65e5\n", max_size=20), st.sets(st.integers(0, 60)), st.lists(st.text("ab", min_size=1)))
def test_pieces_join_up_to_the_final_text(text, borders, stops):
    pieces, final = pieces_of(list(text.encode()), borders, stops)
    assert "".join(pieces) == final
    assert final == cut(text, stops)


@given(st.binary(max_size=20), st.sets(st.integers(0, 20)), st.integers(0, 20))
def test_any_bytes_and_an_end_anywhere(content, borders, end):
    ids = list(content)
    ids[end:] = [EOS] * len(ids[end:])
    pieces, final = pieces_of(ids, borders)
    assert "".join(pieces) == final


def test_text_is_said_as_early_as_it_is_certain():
    assert pieces_of(list("ab\u00e9d".encode()), {1, 3})[0] == ["a", "b", "\u00e9d", ""]
    assert pieces_of(list(b"a\n\nQ"), {2}, ["\n\n"])[0] == ["a", "", ""]
    assert pieces_of(list(b"a\nb"), {2}, ["\n\n"])[0] == ["a", "\nb", ""]


def test_a_decoder_that_changes_its_mind_waits_for_the_end():
    speech = Speech(lambda ids: "".join(map(str, ids)) if len(ids) < 3 else "tidy", eos_id=EOS)
    assert [speech.add([1]), speech.add([2]), speech.add([3])] == ["1", "2", ""]


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [("abc", [], "abc"), ("abc", ["c", "b"], "a"), ("abc", ["x"] * 9, "abc"), ("", ["a"], ""), ("aa", ["aa"], "")],
)
def test_cut(text, stops, expected):
    assert cut(text, stops) == expected


@given(st.text("ab", max_size=6), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.text("ab"))
def test_what_is_not_held_back_is_before_any_stop_to_come(text, stops, more):
    certain = text[: len(text) - held_back(text, stops)]
    if cut(text, stops) == text:
        assert cut(text + more, stops).startswith(certain)
