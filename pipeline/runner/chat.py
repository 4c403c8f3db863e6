"""Turns of a conversation to the text of a prompt, by the chat template of the bundle: Jinja, rendered in a sandbox.

A template comes from strangers. It sees the messages and the special tokens, reaches no attribute of Python's own and
changes nothing; the plainest ways to use up memory are closed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import EnvironmentFault, InputRefused, UsageFault

if TYPE_CHECKING:
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from tokenizers import Tokenizer

MAX_CHARACTERS = 1 << 20  # of a rendered prompt; no model reads so many
MAX_NUMBER = 1 << 31
ROLES = ("system", "user", "assistant", "tool")

Message = Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """Jinja text as the model's author wrote it; `tokens` are the special tokens by role (`bos_token`)."""

    text: str
    tokens: Mapping[str, str] = field(default_factory=dict)

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt that asks for the assistant's next turn; raises UsageFault, InputRefused, EnvironmentFault."""
        check_messages(messages)
        environment = _sandbox()
        from jinja2.exceptions import TemplateError

        pieces, size = [], 0
        try:
            template = environment.from_string(self.text)
            for piece in template.generate(**self.tokens, messages=messages, tools=None, add_generation_prompt=True):
                pieces.append(piece)
                size += len(piece)
                if size > MAX_CHARACTERS:
                    raise InputRefused(
                        f"the chat template made more than {MAX_CHARACTERS} characters of {len(messages)} messages; "
                        "expected a prompt, the bundle's tokenizer_config.json is not to be trusted"
                    )
        except _Refusal as fault:
            raise UsageFault(f"the model's chat template refuses these messages: {fault}") from None
        except (TemplateError, ArithmeticError, LookupError, RecursionError, TypeError, ValueError) as fault:
            raise InputRefused(
                f"the model's chat template cannot be rendered: {type(fault).__name__}: {fault}; expected Jinja that "
                "reads `messages`; mend tokenizer_config.json and export again"
            ) from None
        return "".join(pieces)


def read_template(path: Path, tokenizer: Tokenizer) -> ChatTemplate | None:
    """The template in the `tokenizer_config.json` of a bundle, None where there is none; raises InputRefused."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as fault:
        raise InputRefused(f"{path} cannot be read as JSON: {fault}; export the bundle again") from None
    text, ids = (content.get(key) for key in ("chat_template", "special_ids")) if isinstance(content, dict) else (0, 0)
    if not isinstance(text, str | None) or not isinstance(ids, dict | None):
        raise InputRefused(
            f"{path}: expected an object with chat_template (text or null) and special_ids (an object); "
            "export the bundle again"
        )
    return None if text is None else template_of(text, ids or {}, tokenizer)


def template_of(text: str, special_ids: Mapping[str, int], tokenizer: Tokenizer) -> ChatTemplate:
    """The template with the special tokens that it may name; raises InputRefused for an id that is no token's."""
    tokens = {}
    for role, token_id in special_ids.items():
        token = tokenizer.id_to_token(token_id) if type(token_id) is int and 0 <= token_id < 1 << 32 else None
        if token is None:
            raise InputRefused(f"special_ids: {role} is {token_id!r}, which is the id of no token; export again")
        tokens[role] = token
    return ChatTemplate(text=text, tokens=tokens)


def check_messages(messages: Sequence[Message]) -> None:
    """Raise UsageFault unless there are messages, each with a known role and text."""
    if not messages:
        raise UsageFault('there are no messages; expected a list of {"role": ..., "content": ...}')
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
            raise UsageFault(f"message {number} is {message!r}; expected an object with role and content")
        if message["role"] not in ROLES:
            raise UsageFault(f"message {number} has the role {message['role']!r}; expected {', '.join(ROLES)}")
        if not isinstance(message["content"], str):
            raise UsageFault(f"message {number} has the content {message['content']!r}; expected text")


class _Refusal(Exception):
    """A template said `raise_exception(...)`."""


def _refuse(why: object) -> None:
    raise _Refusal(str(why))


def _sandbox() -> ImmutableSandboxedEnvironment:
    try:
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as fault:
        raise EnvironmentFault(
            f"chat templates are rendered with jinja2, which cannot be imported ({fault}); "
            "install it: pip install 'dllmc[chat]'"
        ) from None

    class Bounded(ImmutableSandboxedEnvironment):
        """Arithmetic is for numbers of a modest size: 'a' * 10**10 or '%9999999999d' % 1 would take all memory."""

        intercepted_binops = frozenset(("*", "**", "%"))

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            numbers = all(isinstance(side, int | float) and abs(side) <= MAX_NUMBER for side in (left, right))
            if not numbers or (operator == "**" and abs(right) > 16):
                raise ValueError(f"{operator} of {type(left).__name__} and {type(right).__name__}")
            return super().call_binop(context, operator, left, right)

    # As transformers sets it up, which is what authors of templates try theirs with.
    made = Bounded(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    made.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    made.globals["raise_exception"] = _refuse
    return made
