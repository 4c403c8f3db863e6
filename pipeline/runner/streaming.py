"""Text of an answer while it grows: pieces that join up to the final text, whatever the tokenizer does at a border."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]


def cut(text: str, stops: Sequence[str]) -> str:
    """The text before the first stop text in it."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


def held_back(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end may turn out to be the beginning of a stop text."""
    lengths = (length for stop in stops for length in range(1, len(stop)) if text.endswith(stop[:length]))
    return max(lengths, default=0)


class Speech:
    """Collects final ids; what it gave out is never taken back."""

    def __init__(self, decode: Decode, *, eos_id: int, stops: Sequence[str] = ()) -> None:
        self.decode, self.eos_id, self.stops = decode, eos_id, stops
        self.ids: list[int] = []
        self.said = ""

    def add(self, ids: Sequence[int]) -> str:
        """The text that these further ids make certain; often ends before they do."""
        self.ids += ids
        known = self.ids[: self.ids.index(self.eos_id)] if self.eos_id in self.ids else self.ids
        # A letter of several ids decodes to a replacement character until all of them are there.
        text = cut(self.decode(known).rstrip("\ufffd"), self.stops)
        text = text[: len(text) - held_back(text, self.stops)]
        # Decoders that tidy up spaces may change what stood before: then the rest waits for the end.
        return self._say(text) if text.startswith(self.said) else ""

    def end(self, text: str) -> str:
        """The rest of the final text."""
        return self._say(text)

    def _say(self, text: str) -> str:
        piece = text[len(self.said) :]
        self.said += piece
        return piece
