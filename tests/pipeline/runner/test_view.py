"""The canvas on a terminal: what is drawn, in which colour, and that a model's text cannot steer the terminal."""

import io
from itertools import groupby

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.runner.results import Step
from pipeline.runner.view import DIM, CanvasView, draw_canvas, has_colour, paint, printable, shade_of, wrap

MASK, EOS = 37, 36
GREEN, YELLOW, RED = "32", "33", "31"


def letters(ids):
    return "".join("abcdefghij"[i] for i in ids)


def as_bytes(ids):
    """One byte an id, as byte-level tokenizers have it."""
    return bytes(ids).decode(errors="replace")


def step(region, committed=(), confidences=(), *, finished=False):
    return Step(
        request=0,
        region=np.array(region, dtype=np.int64),
        committed=np.array(committed, dtype=np.int64),
        confidences=np.array(confidences, dtype=np.float64),
        finished=finished,
    )


def test_runs_holes_and_the_end():
    region = [0, 1, MASK, MASK, 2, EOS, EOS]
    drawn = draw_canvas(region, [GREEN, RED, "", "", "", "", ""], mask_id=MASK, eos_id=EOS, decode=letters, hole="_")
    assert drawn == [("a", GREEN), ("b", RED), ("__", DIM), ("c", "")]


@given(st.text(max_size=8), st.data())
def test_letters_of_several_ids_stay_whole(text, data):
    ids = list(text.encode())
    shades = [data.draw(st.sampled_from([GREEN, YELLOW])) for _ in ids]
    drawn = draw_canvas(ids, shades, mask_id=-1, eos_id=-2, decode=as_bytes)
    assert "".join(part for part, _ in drawn) == printable(text)
    assert all(shade in shades for _, shade in drawn)


def test_a_letter_has_the_colour_of_its_last_id():
    drawn = draw_canvas(list("\u00e9x".encode()), [GREEN, YELLOW, RED], mask_id=-1, eos_id=-2, decode=as_bytes)
    assert drawn == [("\u00e9", YELLOW), ("x", RED)]


@given(st.text())
def test_no_control_character_reaches_the_terminal(text):
    shown = printable(text)
    assert all(c.isprintable() or c == "\n" for c in shown)
    assert "\x1b" not in shown


RUNS = st.lists(
    st.tuples(st.text(st.characters(exclude_categories=["Cc", "Cs"])), st.sampled_from(["", GREEN, DIM])), max_size=6
)


@given(RUNS, st.integers(2, 30))
def test_wrapping_keeps_every_character_and_its_colour(runs, columns):
    lines = wrap(runs, columns)
    assert [pair for line in lines for pair in line] == [(c, shade) for text, shade in runs for c in text]
    assert all(len(line) <= columns for line in lines if all(c.isascii() for c, _ in line))


def test_newlines_end_lines():
    assert wrap([("a\n", GREEN), ("b", RED)], 9) == [[("a", GREEN)], [("b", RED)]]


def test_wide_characters_take_two_cells():
    assert [paint(line, colour=False) for line in wrap([("日本語", "")], 4)] == ["日本", "語"]


@given(RUNS)
def test_colour_is_all_that_painting_adds(runs):
    plain = "".join(text for text, _ in runs)
    assert paint(runs, colour=False) == plain
    painted = paint(runs, colour=True)
    assert painted.count("\x1b[0m") == sum(shade != "" for shade, _ in groupby(runs, key=lambda run: run[1]))
    for shade in (GREEN, DIM, "0"):
        painted = painted.replace(f"\x1b[{shade}m", "")
    assert painted == plain


@pytest.mark.parametrize(
    ("confidence", "shade"),
    [(1.0, GREEN), (0.9, GREEN), (0.899, YELLOW), (0.6, YELLOW), (0.599, RED), (0.0, RED), (float("nan"), "")],
)
def test_confidence_decides_the_colour(confidence, shade):
    assert shade_of(confidence) == shade


@pytest.mark.parametrize(
    ("terminal", "environment", "expected"),
    [
        (True, {}, True),
        (False, {}, False),
        (True, {"NO_COLOR": "1"}, False),
        (True, {"NO_COLOR": ""}, True),
        (True, {"TERM": "dumb"}, False),
    ],
)
def test_colours_are_for_terminals_that_want_them(monkeypatch, terminal, environment, expected):
    for name, value in {"NO_COLOR": "", "TERM": "xterm", **environment}.items():
        monkeypatch.setenv(name, value)
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: terminal)
    assert has_colour(stream) is expected


@pytest.fixture
def narrow(monkeypatch):
    monkeypatch.setenv("COLUMNS", "5")
    monkeypatch.setenv("LINES", "20")


def test_redrawing_goes_back_to_where_it_began(narrow):
    stream = io.StringIO()
    view = CanvasView(stream, mask_id=MASK, eos_id=EOS, decode=letters)
    view(step([0] * 9 + [MASK]))
    assert stream.getvalue() == "\r\x1b[Jaaaa\naaaa\na_"
    view(step([0] * 10, finished=True))
    view.erase()
    assert stream.getvalue().endswith("\r\x1b[2A\x1b[Jaaaa\naaaa\naa\r\x1b[2A\x1b[J")


def test_what_scrolled_away_is_not_drawn_again(narrow, monkeypatch):
    monkeypatch.setenv("LINES", "3")
    stream = io.StringIO()
    view = CanvasView(stream, mask_id=MASK, eos_id=EOS, decode=letters)
    view(step([0] * 4 + [1] * 4 + [2] * 4))
    assert stream.getvalue() == "\r\x1b[Jbbbb\ncccc"
    view.erase()
    assert stream.getvalue().endswith("\r\x1b[1A\x1b[J")


def test_frames_that_nobody_could_see_are_left_out(narrow, monkeypatch):
    clock = iter((0.0, 0.01, 0.04, 0.05))
    monkeypatch.setattr("pipeline.runner.view.time.monotonic", lambda: next(clock))
    stream = io.StringIO()
    view = CanvasView(stream, mask_id=MASK, eos_id=EOS, decode=letters)
    for number in range(3):
        view(step([number]))
    view(step([3], finished=True))
    assert [letter for letter in stream.getvalue() if letter in "abcd"] == ["a", "c", "d"]


def test_colours_are_those_of_the_step_that_wrote(narrow, monkeypatch):
    monkeypatch.setattr("pipeline.runner.view.REDRAW_SECONDS", 1e9)  # between the first step and the last
    stream = io.StringIO()
    view = CanvasView(stream, mask_id=MASK, eos_id=EOS, decode=letters, colour=True)
    view(step([0, MASK, MASK], [0], [0.95]))
    assert stream.getvalue().endswith(f"\x1b[{GREEN}ma\x1b[0m\x1b[{DIM}m__\x1b[0m")
    view(step([0, MASK, 1], [2], [0.3]))
    view(step([2, EOS, 1, MASK], [0], [0.7], finished=True))  # rewritten, and the canvas grew
    painted = f"\x1b[{YELLOW}mc\x1b[0m\x1b[{RED}mb\x1b[0m\x1b[{DIM}m_\x1b[0m"
    assert stream.getvalue().endswith(f"\r\x1b[J{painted}")
