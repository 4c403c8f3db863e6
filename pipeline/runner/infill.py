"""Text with gaps: `<mask:N>` stands for N tokens that the model writes, the rest is kept as it is."""

from __future__ import annotations

import re
from collections.abc import Callable

from pipeline.errors import UsageFault

GAP = re.compile(r"<mask:([^<>]*)>")
MAX_DIGITS = 6


def parse_gaps(text: str) -> list[str | int]:
    """Texts and lengths of gaps in tokens, by turns, a text first and last; raises UsageFault."""
    parts: list[str | int] = []
    for place, part in enumerate(GAP.split(text)):
        if place % 2 == 0:
            parts.append(part)
            continue
        if not (part.isascii() and part.isdecimal() and len(part) <= MAX_DIGITS) or int(part) < 1:
            raise UsageFault(f"the gap <mask:{part}> has no length; expected <mask:N> for N tokens, N 1 or more")
        parts.append(int(part))
    if len(parts) == 1:
        raise UsageFault("the text has no gap to fill; write <mask:N> where N tokens are wanted")
    return parts


def canvas_of(text: str, *, mask_id: int, encode: Callable[[str, bool], list[int]]) -> list[int]:
    """Ids of a text with gaps, masks in them; `encode` gets a text and whether special tokens go around it.

    Raises UsageFault where there is no gap, or where the text itself holds the mask token.
    """
    ids: list[int] = []
    for place, part in enumerate(parse_gaps(text)):
        if isinstance(part, int):
            ids += [mask_id] * part
            continue
        plain = encode(part, False)
        if mask_id in plain:
            raise UsageFault(f"the text {part[:40]!r} holds the model's mask token; write <mask:N> for a gap")
        ids += _leading(encode(part, True), plain) if place == 0 else []
        ids += plain
    return ids


def _leading(with_special: list[int], plain: list[int]) -> list[int]:
    """The special tokens that the tokenizer puts before a text, which a canvas has at its start only."""
    starts = range(len(with_special) - len(plain) + 1)
    start = next((at for at in starts if with_special[at : at + len(plain)] == plain), 0)
    return with_special[:start]
