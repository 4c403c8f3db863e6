"""A bundle opened on a device: verified, then its tokenizer, settings and session."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.backends.backend import Session
from pipeline.backends.ort import open_session
from pipeline.errors import EnvironmentFault, InputRefused, UsageFault
from pipeline.folder import CONFIG, MODEL, TOKENIZER
from pipeline.manifest import verify
from pipeline.runner.canvas import Result
from pipeline.runner.loop import Step, generate
from pipeline.runner.settings import GenerateOptions, Settings, read_settings

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One answer: its text (special tokens left out) and what the loop says of it."""

    text: str
    prompt_tokens: int
    result: Result


class TextModel:
    """Session, settings and tokenizer of one model, whatever runs it."""

    def __init__(self, session: Session, settings: Settings, tokenizer: Tokenizer) -> None:
        self.session = session
        self.settings = settings
        self.tokenizer = tokenizer

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """Ids of a text; `special_tokens` adds those that the tokenizer puts around a prompt."""
        try:
            ids: list[int] = self.tokenizer.encode(text, add_special_tokens=special_tokens).ids
        except (TypeError, UnicodeEncodeError):
            raise UsageFault(f"the text {text[:40]!r} is not valid Unicode; pass it as UTF-8") from None
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; special tokens are left out."""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def generate_text(
        self,
        prompts: Sequence[str],
        options: GenerateOptions | None = None,
        *,
        request_ids: Sequence[int] | None = None,
        on_step: Callable[[Step], None] | None = None,
        batch_size: int = 32,
    ) -> list[Completion]:
        """Answer every prompt; `options` None takes the model's defaults. Raises UsageFault for a long prompt."""
        encoded = [self.encode(prompt) for prompt in prompts]
        results = generate(
            self.session,
            self.settings,
            encoded,
            options or self.settings.generation,
            request_ids=request_ids,
            on_step=on_step,
            batch_size=batch_size,
        )
        return [
            Completion(text=self.decode(result.ids), prompt_tokens=len(ids), result=result)
            for ids, result in zip(encoded, results, strict=True)
        ]


class Runner(TextModel):
    """The bundle in `folder`, run by ONNX Runtime; every file is checked against the manifest first.

    `on_bytes` gets the bytes checked and to check. Raises HashMismatch, InputRefused, EnvironmentFault.
    """

    def __init__(
        self, folder: Path, *, threads: int | None = None, on_bytes: Callable[[int, int], None] | None = None
    ) -> None:
        verify(folder, on_bytes=on_bytes)
        settings = read_settings(folder / CONFIG)
        tokenizer = _open_tokenizer(folder / TOKENIZER)
        session = open_session(folder / MODEL, threads=threads)
        if session.top_k != settings.top_k:
            raise InputRefused(
                f"{folder}: the model records {session.top_k} ids a row, {CONFIG} says {settings.top_k}; export again"
            )
        super().__init__(session, settings, tokenizer)


def _open_tokenizer(path: Path) -> Tokenizer:
    try:
        from tokenizers import Tokenizer
    except ImportError as fault:
        raise EnvironmentFault(f"tokenizers cannot be imported ({fault}); install it: pip install tokenizers") from None
    try:
        return Tokenizer.from_file(str(path))
    except Exception as fault:  # the library raises the base class
        raise InputRefused(f"{path} cannot be read by the installed tokenizers package: {fault}") from None
