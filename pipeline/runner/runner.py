"""A bundle opened on a device: verified, then its tokenizer, settings and session; text in, text out."""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.backends.backend import Feeds, Floats, Session
from pipeline.backends.ort import open_session
from pipeline.errors import EnvironmentFault, InputRefused, UsageFault
from pipeline.folder import CONFIG, GUIDED, MODEL, SCORE, TOKENIZER, TOKENIZER_CONFIG
from pipeline.manifest import verify
from pipeline.runner.chat import ChatTemplate, Message, read_template
from pipeline.runner.infill import canvas_of
from pipeline.runner.loop import Engine, checked, denoise
from pipeline.runner.results import Block, Request, Result, Step
from pipeline.runner.settings import GenerateOptions, Settings, read_settings
from pipeline.runner.streaming import Speech

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from pipeline.backends.score import ScoreSession
    from pipeline.runner.scoring import Score


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One answer: its text (special tokens left out) and what the loop says of it.

    `seconds` run from the call to the last pass of this request: its prefill is in them, and its wait in a batch.
    """

    text: str
    prompt_tokens: int
    result: Result
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Ids up to the first end-of-text by all seconds."""
        return len(self.result.ids) / self.seconds if self.seconds > 0 else 0.0


@dataclass(frozen=True)
class Piece:
    """Text that is final; the pieces of a stream join up to the text of its completion."""

    text: str


StreamEvent = Step | Piece | Completion


class TextModel:
    """Session, settings and tokenizer of one model, whatever runs it.

    `options` and keywords of `GenerateOptions` say how to generate; without them the model's own defaults hold.
    `open_scoring` opens the graph that scores and has whole rows of logits, `open_guided` the one of guided requests,
    when they are first needed.
    """

    def __init__(
        self,
        session: Session,
        settings: Settings,
        tokenizer: Tokenizer,
        *,
        template: ChatTemplate | None = None,
        open_scoring: Callable[[], ScoreSession] | None = None,
        open_guided: Callable[[], Session] | None = None,
    ) -> None:
        self.session = session
        self.settings = settings
        self.tokenizer = tokenizer
        self.template = template
        self.open_scoring = open_scoring
        full_logits = None if open_scoring is None else self._full_logits
        self.engine = Engine(session, settings, full_logits=full_logits, open_guided=open_guided)
        self._scoring: ScoreSession | None = None

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

    def text_of(self, result: Result) -> str:
        """The text of a result, up to its stop text where one ended it."""
        return self.decode(result.ids) if result.text is None else result.text

    def options(self, base: GenerateOptions | None = None, **changes: Any) -> GenerateOptions:
        """`base`, or the model's defaults, with these changes; raises UsageFault."""
        known = [field.name for field in fields(GenerateOptions)]
        if unknown := [name for name in changes if name not in known]:
            near = difflib.get_close_matches(unknown[0], known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
            raise UsageFault(f"unknown option of generation {unknown[0]!r}; {hint}")
        options = replace(base or self.settings.generation, **changes)
        options.check()
        return options

    def request(self, prompt: str | Sequence[Message], options: GenerateOptions, *, number: int = 0) -> Request:
        """What the loop is asked for a text, or for the next turn of a conversation; raises UsageFault, InputRefused.

        `number` tells it from other requests and keys its draws.
        """
        ids = self.encode(prompt) if isinstance(prompt, str) else self.encode_chat(prompt)
        if self.settings.mask_id in ids:
            raise UsageFault(
                f"the prompt holds the model's mask token (id {self.settings.mask_id}); leave it out, or ask for a "
                "text with gaps: dllmc run DIR --infill 'a <mask:8> b'"
            )
        return checked(Request(ids=ids, request=number), self.settings, options)

    def generate(
        self,
        prompts: Sequence[str],
        options: GenerateOptions | None = None,
        *,
        request_ids: Sequence[int] | None = None,
        batch_size: int = 32,
        **changes: Any,
    ) -> list[Completion]:
        """Answer every prompt; no answer depends on the others. Raises UsageFault for a prompt that is too long."""
        if isinstance(prompts, str):
            raise UsageFault("prompts is one text; expected a list of texts, pass [text]")
        chosen = self.options(options, **changes)
        keys = range(len(prompts)) if request_ids is None else request_ids
        requests = [self.request(prompt, chosen, number=key) for prompt, key in zip(prompts, keys, strict=True)]
        return self._finished(requests, chosen, batch_size)

    def stream(
        self, prompt: str | Sequence[Message], options: GenerateOptions | None = None, **changes: Any
    ) -> Generator[StreamEvent, None, None]:
        """Steps, pieces of text as soon as they are final, and at last the completion; closing it cancels.

        A list of messages is a conversation, as for `chat`.
        """
        chosen = self.options(options, **changes)
        return self._stream(self.request(prompt, chosen), chosen)

    def chat(self, messages: Sequence[Message], options: GenerateOptions | None = None, **changes: Any) -> Completion:
        """The assistant's next turn; raises UsageFault where the model has no chat template."""
        if isinstance(messages, str):
            raise UsageFault('messages is one text; expected a list, pass [{"role": "user", "content": text}]')
        chosen = self.options(options, **changes)
        (completion,) = self._finished([self.request(messages, chosen)], chosen, batch_size=1)
        return completion

    def infill(self, text: str, options: GenerateOptions | None = None, **changes: Any) -> Completion:
        """The text with each `<mask:N>` written by the model, N tokens at most; an end-of-text shortens a gap."""

        def encode(part: str, special_tokens: bool) -> list[int]:
            return self.encode(part, special_tokens=special_tokens)

        return self.fill(canvas_of(text, mask_id=self.settings.mask_id, encode=encode), options, **changes)

    def fill(self, canvas: Sequence[int], options: GenerateOptions | None = None, **changes: Any) -> Completion:
        """The canvas with its mask ids written, nothing else; raises UsageFault where it has none."""
        request = Request(ids=[int(i) for i in canvas], fill=True)
        (completion,) = self._finished([request], self.options(options, **changes), batch_size=1)
        return completion

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a conversation by the model's chat template, which places the special tokens itself."""
        return self.encode(self.chat_template().render(messages), special_tokens=False)

    def chat_template(self) -> ChatTemplate:
        """The template; raises UsageFault where the model has none."""
        if self.template is None:
            raise UsageFault(
                "the model has no chat template: none came with its tokenizer files; "
                "generate from a plain prompt instead (dllmc run)"
            )
        return self.template

    def score(
        self,
        prompt: str,
        answer: str,
        *,
        samples: int = 128,
        seed: int = 0,
        batch_size: int = 32,
        guidance: float = 0.0,
    ) -> Score:
        """A bound on -log2 p(answer | prompt), estimated on drawn masks; raises UsageFault for an empty answer."""
        from pipeline.runner.scoring import score

        ids, expected = self.encode(prompt), self.encode(answer, special_tokens=False)
        how = {"samples": samples, "seed": seed, "batch_size": batch_size}
        return score(self.scoring(), self.settings, ids, expected, **how, guidance=guidance)

    def scoring(self) -> ScoreSession:
        """The graph that scores, opened at the first call; raises UsageFault where there is none."""
        if self._scoring is None:
            if self.open_scoring is None:
                raise UsageFault(f"this model cannot score: it came without {SCORE}; export the bundle again")
            self._scoring = self.open_scoring()
        return self._scoring

    def _full_logits(self, feeds: Feeds, row: int, head_row: int) -> Floats:
        from pipeline.runner.scoring import row_logits

        return row_logits(self.scoring(), feeds, row, head_row)

    def _finished(self, requests: Sequence[Request], options: GenerateOptions, batch_size: int) -> list[Completion]:
        """Completions in the order of the requests."""
        started = time.perf_counter()
        seconds: dict[int, float] = {}

        def note(result: Result) -> None:
            seconds[result.request] = time.perf_counter() - started

        results = denoise(self.engine, requests, options, on_done=note, batch_size=batch_size, decode=self.decode)
        return [
            self._completion(request, result, seconds[result.request])
            for request, result in zip(requests, results, strict=True)
        ]

    def _completion(self, request: Request, result: Result, seconds: float) -> Completion:
        given = [i for i in request.ids if i != self.settings.mask_id]
        return Completion(text=self.text_of(result), prompt_tokens=len(given), result=result, seconds=seconds)

    def _stream(self, request: Request, options: GenerateOptions) -> Generator[StreamEvent, None, None]:
        started = time.perf_counter()
        speech = Speech(self.decode, eos_id=self.settings.eos_id, stops=options.stop)
        with closing(self.engine.run([request], options, batch_size=1, decode=self.decode)) as events:
            for event in events:
                if isinstance(event, Step):
                    yield event
                    continue
                if isinstance(event, Block):
                    text, completion = speech.add(event.ids), None
                else:
                    completion = self._completion(request, event.result, time.perf_counter() - started)
                    text = speech.end(completion.text)
                if text:
                    yield Piece(text)
                if completion is not None:
                    yield completion


class Runner(TextModel):
    """The bundle in `folder`, run by ONNX Runtime; every file is checked against the manifest first.

    `on_bytes` gets the bytes checked and to check. Raises HashMismatch, InputRefused, EnvironmentFault.
    """

    def __init__(
        self,
        folder: str | Path,
        threads: int | None = None,
        *,
        on_bytes: Callable[[int, int], None] | None = None,
    ) -> None:
        folder = Path(folder)
        verify(folder, on_bytes=on_bytes)
        settings = read_settings(folder / CONFIG)
        tokenizer = _open_tokenizer(folder / TOKENIZER)
        template = read_template(folder / TOKENIZER_CONFIG, tokenizer)
        session = open_session(folder / MODEL, threads=threads)
        if session.top_k != settings.top_k:
            raise InputRefused(
                f"{folder}: the model records {session.top_k} ids a row, {CONFIG} says {settings.top_k}; export again"
            )

        def open_scoring() -> ScoreSession:
            from pipeline.backends.score import open_score

            return open_score(folder / SCORE, threads=threads)

        def open_pairs() -> Session:
            from pipeline.backends.guided import open_guided

            return open_guided(folder / GUIDED, threads=threads)

        super().__init__(
            session,
            settings,
            tokenizer,
            template=template,
            open_scoring=open_scoring if (folder / SCORE).exists() else None,
            open_guided=open_pairs,
        )


def _open_tokenizer(path: Path) -> Tokenizer:
    try:
        from tokenizers import Tokenizer
    except ImportError as fault:
        raise EnvironmentFault(f"tokenizers cannot be imported ({fault}); install it: pip install tokenizers") from None
    try:
        return Tokenizer.from_file(str(path))
    except Exception as fault:  # the library raises the base class
        raise InputRefused(f"{path} cannot be read by the installed tokenizers package: {fault}") from None
