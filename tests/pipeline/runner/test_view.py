"""The canvas on a terminal: what is drawn, and that a model's text cannot steer the terminal."""

import io

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.runner import Step
from pipeline.runner.view import CanvasView, draw_canvas, printable, wrap

MASK, EOS = 37, 36


def letters(ids):
    return "".join("abcdefghij"[i] for i in ids)


def test_runs_holes_and_the_end():
    region = [0, 1, MASK, MASK, 2, EOS, EOS]
    assert draw_canvas(region, mask_id=MASK, eos_id=EOS, decode=letters, hole="_") == "ab__c"


@given(st.text())
def test_no_control_character_reaches_the_terminal(text):
    shown = printable(text)
    assert all(c.isprintable() or c == "\n" for c in shown)
    assert "\x1b" not in shown


@given(st.text(st.characters(exclude_categories=["Cc", "Cs"])), st.integers(2, 30))
def test_wrapping_keeps_every_character(text, columns):
    assert "".join(wrap(text, columns)) == text
    assert all(len(line) <= columns for line in wrap(text, columns) if line.isascii())


def test_wide_characters_take_two_cells():
    assert wrap("日本語", 4) == ["日本", "語"]


def test_redrawing_goes_back_to_where_it_began(monkeypatch):
    monkeypatch.setenv("COLUMNS", "5")
    monkeypatch.setenv("LINES", "20")
    stream = io.StringIO()
    view = CanvasView(stream, mask_id=MASK, eos_id=EOS, decode=letters)
    none = np.array([], dtype=np.int64)
    view(Step(request=0, region=np.array([0] * 9 + [MASK]), committed=none, finished=False))
    assert stream.getvalue() == "\r\x1b[Jaaaa\naaaa\na_"
    view(Step(request=0, region=np.array([0] * 10), committed=none, finished=True))
    view.erase()
    assert stream.getvalue().endswith("\r\x1b[2A\x1b[Jaaaa\naaaa\naa\r\x1b[2A\x1b[J")
