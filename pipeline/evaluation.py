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
from pipeline.runner import GenerateOptions, Runner, Settings, Step, TextModel, generate
from pipeline.runner.loop import checked_prompt


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

    `unreachable` answers have more tokens than gen_length; they count as wrong.
    """

    exact_match: float
    count: int
    nfe: float
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
    model: str, *, threads: int | None = None, on_bytes: Callable[[int, int], None] | None = None
) -> TextModel:
    """A bundle in ONNX Runtime, or a checkpoint folder (or `builtin:` name) at full precision in torch.

    `on_bytes` gets the bytes of a bundle that were checked and are to check.
    """
    folder = user_path(model)
    if os.path.exists(folder / MANIFEST):
        return Runner(folder, threads=threads, on_bytes=on_bytes)
    from dataclasses import replace

    import torch

    from pipeline.backends.eager import open_transformer
    from pipeline.models import resolve
    from pipeline.models.checkpoint import load_model, open_checkpoint
    from pipeline.models.tokenizer import read_tokenizer

    if threads is not None:
        torch.set_num_threads(threads)
    checkpoint = open_checkpoint(resolve(model))
    source = read_tokenizer(checkpoint.folder, checkpoint.config)
    settings = Settings.of_model(checkpoint.config)
    settings = replace(settings, vocab_size=min(settings.vocab_size, source.id_limit))  # as the bundle has it
    session = open_transformer(load_model(checkpoint), top_k=settings.top_k)
    return TextModel(session, settings, source.parsed())


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

    def count(step: Step) -> None:
        nonlocal done
        done += step.finished
        if step.finished and on_done is not None:
            on_done(done)

    prompts = [_encoded(model, item, options) for item in items]
    expected = [model.encode(item.answer, special_tokens=False) for item in items]
    started = time.monotonic()
    results = generate(
        model.session,
        model.settings,
        prompts,
        options,
        request_ids=[item.line - 1 for item in items],
        on_step=count,
        batch_size=batch_size,
    )
    seconds = time.monotonic() - started
    right = sum(is_right(model, result.ids, item.answer) for result, item in zip(results, items, strict=True))
    return Score(
        exact_match=right / len(items),
        count=len(items),
        nfe=sum(result.nfe for result in results) / len(items),
        seconds=round(seconds, 3),
        unreachable=sum(len(ids) > options.gen_length for ids in expected),
    )


def is_right(model: TextModel, ids: Sequence[int], answer: str) -> bool:
    """Whether the ids say what the answer does once it is encoded, white space aside."""
    expected = model.decode(model.encode(answer, special_tokens=False))
    return normalised(model.decode(ids)) == normalised(expected)


def _encoded(model: TextModel, item: Item, options: GenerateOptions) -> list[int]:
    try:
        return checked_prompt(model.encode(item.prompt), model.settings, options)
    except UsageFault as fault:
        raise UsageFault(f"line {item.line}: {fault}") from None


def normalised(text: str) -> str:
    """The text with every run of white space made one space, none at the ends."""
    return " ".join(text.split())
