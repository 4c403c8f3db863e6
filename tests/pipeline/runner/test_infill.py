"""Text with gaps: what becomes a mask and what stays, and gaps that are none."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import UsageFault
from pipeline.runner.infill import canvas_of, parse_gaps

MASK, BOS, EOS = 99, 97, 98


def encode(text, special):
    ids = [ord(letter) - ord("a") for letter in text]
    return [BOS, *ids, EOS] if special else ids


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ab<mask:2>c", [BOS, 0, 1, MASK, MASK, 2]),
        ("a<mask:1><mask:2>", [BOS, 0, MASK, MASK, MASK]),
        ("<mask:3>b", [MASK, MASK, MASK, 1]),
        ("a<mask:01>", [BOS, 0, MASK]),
    ],
)
def test_gaps_become_masks(text, expected):
    assert canvas_of(text, mask_id=MASK, encode=encode) == expected


@given(st.lists(st.text(st.characters(exclude_characters="<")), min_size=2), st.data())
def test_texts_and_gaps_take_turns(texts, data):
    gaps = [data.draw(st.integers(1, 999)) for _ in texts[1:]]
    written = texts[0] + "".join(f"<mask:{gap}>{text}" for gap, text in zip(gaps, texts[1:], strict=True))
    parts = parse_gaps(written)
    assert parts[::2] == texts
    assert parts[1::2] == gaps


@pytest.mark.parametrize("length", ["", "0", "-1", "x", "1.5", "\u0663", "9" * 7, " 1", "000"])
def test_a_gap_without_a_length_is_refused(length):
    with pytest.raises(UsageFault, match="has no length"):
        parse_gaps(f"a<mask:{length}>b")


@pytest.mark.parametrize("text", ["", "a", "<mask>", "<mask:3"])
def test_a_text_without_a_gap_is_refused(text):
    with pytest.raises(UsageFault, match="no gap"):
        parse_gaps(text)


def test_the_mask_token_itself_is_no_gap():
    with pytest.raises(UsageFault, match="holds the model's mask token"):
        canvas_of(chr(ord("a") + MASK) + "<mask:1>", mask_id=MASK, encode=encode)
