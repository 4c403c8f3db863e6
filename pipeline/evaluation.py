"""Exact match of a model on a task: is the generated answer, decoded and whitespace-normalised, the expected one?"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import InputRefused, UsageFault
from pipeline.folder import MANIFEST, user_path
from pipeline.runner import GenerateOptions, Request, Result, Runner, Settings, TextModel, denoise


@dataclass(frozen=True, kw_only=True)
class Item:
    """One line of a task file, counted from 1."""

    line: int
    prompt: str
    answer: str
    kind: str = "task"


@dataclass(frozen=True, kw_only=True)
class Score:
    """`exact_match` is a share 0..1; `nfe` the forward passes of an item on average; `seconds` without loading.

    `tpf` is the mean over items of tokens by passes, `tokens_per_second` all tokens by all seconds: both count up to
    the first end-of-text. `unreachable` answers have more tokens than gen_length; they count as wrong.
    """

    exact_match: float
    count: int
    nfe: float
    nfe_full: float
    tpf: float
    tokens_per_second: float
    seconds: float
    unreachable: int


def read_task(path: Path, limit: int | None = None) -> list[Item]:
    """Items of a JSON-lines file with `prompt` and `answer`; raises InputRefused with the line of a malformed one."""
    try:
        content = path.read_bytes()
    except OSError as fault:
        raise UsageFault(f"{path} cannot be read: {fault.strerror}; pass a file with --task FILE.jsonl") from None
    lines = content.rstrip().split(b"\n")
    if lines == [b""]:
        raise InputRefused(f'{path} is empty; expected one object {{"prompt": ..., "answer": ...}} a line')
    return [_item(path, number, line) for number, line in enumerate(lines[:limit], start=1)]


def _item(path: Path, number: int, line: bytes) -> Item:
    where = f"{path} line {number}"
    try:
        value = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as fault:
        raise InputRefused(f"{where} is not JSON: {fault}") from None
    if not isinstance(value, dict):
        raise InputRefused(f"{where} is {type(value).__name__}; expected an object with prompt and answer")
    for key in ("prompt", "answer"):
        if not isinstance(value.get(key), str):
            raise InputRefused(f"{where}: {key} is {value.get(key)!r}; expected text")
        if not value[key].isascii() and not _is_unicode(value[key]):
            raise InputRefused(f"{where}: {key} holds half a surrogate pair; expected Unicode text")
    kind = value.get("kind", Item.kind)
    if not isinstance(kind, str):
        raise InputRefused(f"{where}: kind is {kind!r}; expected text, or no kind")
    return Item(line=number, prompt=value["prompt"], answer=value["answer"], kind=kind)


def _is_unicode(text: str) -> bool:
    return not any(0xD800 <= ord(c) <= 0xDFFF for c in text)


def open_model(
    name: str, *, threads: int | None = None, on_bytes: Callable[[int, int], None] | None = None
) -> TextModel:
    """A bundle in ONNX Runtime, or a checkpoint folder (or `builtin:` name) at full precision in torch.

    `on_bytes` gets the bytes of a bundle that were checked and are to check.
    """
    folder = user_path(name)
    if os.path.exists(folder / MANIFEST):
        return Runner(folder, threads=threads, on_bytes=on_bytes)
    from dataclasses import replace

    import torch

    from pipeline.backends.eager import open_transformer
    from pipeline.backends.guided import EagerGuided
    from pipeline.backends.score import EagerScore
    from pipeline.models import resolve
    from pipeline.models.checkpoint import load_model, open_checkpoint
    from pipeline.models.tokenizer import read_tokenizer
    from pipeline.runner.chat import template_of

    if threads is not None:
        torch.set_num_threads(threads)
    checkpoint = open_checkpoint(resolve(name))
    source = read_tokenizer(checkpoint.folder, checkpoint.config)
    settings = Settings.of_model(checkpoint.config)
    settings = replace(settings, vocab_size=min(settings.vocab_size, source.id_limit))  # as the bundle has it
    model = load_model(checkpoint)
    session = open_transformer(model, top_k=settings.top_k)
    tokenizer = source.parsed()
    text = source.chat_template
    template = None if text is None else template_of(text, source.special_ids, tokenizer)
    return TextModel(
        session,
        settings,
        tokenizer,
        template=template,
        open_scoring=lambda: EagerScore(model),
        open_guided=lambda: EagerGuided(model, top_k=settings.top_k),
    )


def evaluate(
    model: TextModel,
    items: Sequence[Item],
    options: GenerateOptions,
    *,
    batch_size: int = 32,
    on_done: Callable[[int], None] | None = None,
) -> Score:
    """Score the items; `on_done` gets the number of finished ones. Raises UsageFault for a prompt that is too long."""
    done = 0

    def count(_: Result) -> None:
        nonlocal done
        done += 1
        if on_done is not None:
            on_done(done)

    requests = [_request(model, item, options) for item in items]
    expected = [model.encode(item.answer, special_tokens=False) for item in items]
    started = time.monotonic()
    results = denoise(model.engine, requests, options, on_done=count, batch_size=batch_size, decode=model.decode)
    seconds = time.monotonic() - started
    pairs = zip(results, items, strict=True)
    right = sum(says(model, model.text_of(result), item.answer) for result, item in pairs)
    return Score(
        exact_match=right / len(items),
        count=len(items),
        nfe=sum(result.nfe for result in results) / len(items),
        nfe_full=sum(result.nfe_full for result in results) / len(items),
        tpf=sum(result.tpf for result in results) / len(items),
        tokens_per_second=round(sum(len(result.ids) for result in results) / seconds, 3),
        seconds=round(seconds, 3),
        unreachable=sum(len(ids) > (options.gen_length or model.settings.max_length) for ids in expected),
    )


def is_right(model: TextModel, ids: Sequence[int], answer: str) -> bool:
    """Whether the ids say what the answer does once it is encoded, white space aside."""
    return says(model, model.decode(ids), answer)


def says(model: TextModel, text: str, answer: str) -> bool:
    """The same of a text."""
    return normalised(text) == normalised(model.decode(model.encode(answer, special_tokens=False)))


def _request(model: TextModel, item: Item, options: GenerateOptions) -> Request:
    try:
        return model.request(item.prompt, options, number=item.line - 1)
    except UsageFault as fault:
        raise UsageFault(f"line {item.line}: {fault}") from None


def normalised(text: str) -> str:
    """The text with every run of white space made one space, none at the ends."""
    return " ".join(text.split())
