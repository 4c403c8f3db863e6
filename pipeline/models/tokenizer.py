"""The tokenizer of a checkpoint folder as one `tokenizer.json` text that `tokenizers.Tokenizer` reads without torch.

Ids are those transformers gives: its classes are built in memory from the values below, so they open no file, follow no
`auto_map` and reach no network.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from pipeline.errors import EnvironmentFault, InputRefused
from pipeline.models.config import ModelConfig
from pipeline.models.json_file import read_json, read_text
from pipeline.models.links import check_link

QWEN2_CLASSES = ("DreamTokenizer", "Qwen2Tokenizer", "Qwen2TokenizerFast")
SPECIALS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# All that is handed to transformers besides tokens; every other key of tokenizer_config.json stays unread.
PASSED_ON = ("add_bos_token", "add_eos_token", "add_prefix_space")
DECIDED_BY_FILE = ("add_bos_token", "add_eos_token")  # a tokenizer.json says itself what it puts around a text


@dataclass(frozen=True, kw_only=True)
class TokenizerSource:
    """`text` is a whole tokenizer.json; `special_ids` go by role (`eos_token`); no id from `id_limit` on has a token.

    `chat_template` is Jinja text as found, never run here.
    """

    text: str
    special_ids: dict[str, int]
    chat_template: str | None
    id_limit: int

    def parsed(self) -> Tokenizer:
        """What encodes and decodes."""
        return Tokenizer.from_str(self.text)


def read_tokenizer(folder: Path, config: ModelConfig) -> TokenizerSource:
    """From tokenizer.json, or vocab.json + merges.txt as Dream ships them; raises InputRefused."""
    settings = _optional(folder / "tokenizer_config.json")
    if settings.get("split_special_tokens"):
        raise InputRefused(
            f"{folder / 'tokenizer_config.json'}: split_special_tokens is true, which a tokenizer.json cannot express; "
            "expected false or no such key"
        )
    listed = isinstance(settings.get("added_tokens_decoder"), dict)
    # The older files count only where tokenizer_config.json does not list the added tokens: as in transformers.
    roles = settings if listed else _optional(folder / "special_tokens_map.json") | settings
    specials = _special_tokens(folder, roles)
    added = _listed_tokens(folder, settings) if listed else _older_added_tokens(folder, specials)
    options = {key: settings[key] for key in PASSED_ON if settings.get(key) is not None}
    options["extra_special_tokens"] = _extra_tokens(folder, roles)
    tokenizer = _guarded(folder, lambda: _build(folder, settings, options | specials, added))
    for token_id, token in added.items():
        if tokenizer.token_to_id(token.content) != token_id:
            raise InputRefused(
                f"{folder}: the added token {token.content!r} has id {token_id} in its tokenizer files, but gets "
                f"{tokenizer.token_to_id(token.content)}: ids before it have no token, or it stands in the "
                "vocabulary elsewhere; expected consecutive ids, complete the added tokens"
            )
    ids = tokenizer.get_vocab(with_added_tokens=True)
    if not ids:
        raise InputRefused(f"{folder}: the tokenizer has no tokens; download the tokenizer files again")
    last = max(ids, key=ids.__getitem__)
    if ids[last] >= config.embedding_size:
        raise InputRefused(
            f"{folder}: the tokenizer gives {last!r} the id {ids[last]}, but config.json describes only "
            f"{config.embedding_size} embedding rows; tokenizer and weights are of different models"
        )
    return TokenizerSource(
        text=tokenizer.to_str(pretty=False),
        special_ids={role: ids[token.content] for role, token in specials.items() if token.content in ids},
        chat_template=_chat_template(folder, settings),
        id_limit=ids[last] + 1,
    )


def _build(
    folder: Path, settings: Mapping[str, Any], options: dict[str, Any], added: dict[int, AddedToken]
) -> Tokenizer:
    """The backend of the transformers class that fits the files present."""
    if (folder / "tokenizer.json").exists():
        from transformers import PreTrainedTokenizerFast

        plain = Tokenizer.from_str(read_text(folder / "tokenizer.json"))
        plain.no_truncation()  # a length baked into the file would cut prompts without a word
        plain.no_padding()
        options = {key: value for key, value in options.items() if key not in DECIDED_BY_FILE}
        fast = PreTrainedTokenizerFast(tokenizer_object=plain, added_tokens_decoder=added, **options)
        return _backend(fast)
    vocab, merges = _vocab_and_merges(folder, settings)
    from transformers import Qwen2Tokenizer

    options = dict.fromkeys(("unk_token", "eos_token", "pad_token")) | options  # no tokens that the folder lacks
    return _backend(Qwen2Tokenizer(vocab=vocab, merges=merges, added_tokens_decoder=added, **options))


def _backend(fast: Any) -> Tokenizer:
    backend: Tokenizer = fast.backend_tokenizer
    return backend


def _vocab_and_merges(folder: Path, settings: Mapping[str, Any]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    missing = [name for name in ("vocab.json", "merges.txt") if not (folder / name).exists()]
    if missing:
        raise InputRefused(
            f"{folder} has no tokenizer: found neither tokenizer.json nor {' and '.join(missing)}; expected "
            "tokenizer.json, or vocab.json with merges.txt; download the tokenizer files of the model"
        )
    kind = settings.get("tokenizer_class", QWEN2_CLASSES[0])
    if kind not in QWEN2_CLASSES:
        raise InputRefused(
            f"{folder / 'tokenizer_config.json'}: tokenizer_class is {kind!r}, and vocab.json with merges.txt does not "
            f"say how it splits text; expected one of {', '.join(QWEN2_CLASSES)}, or a tokenizer.json in the folder "
            "(transformers: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR))"
        )
    vocab = read_json(folder / "vocab.json")
    if any(type(token_id) is not int or token_id < 0 for token_id in vocab.values()):
        raise InputRefused(f"{folder / 'vocab.json'} must map tokens to ids from 0; download it again")
    merges = []
    lines = read_text(folder / "merges.txt").split("\n")  # not splitlines: tokens may hold other line breaks
    for number, line in enumerate(lines, start=1):
        if not line or (number == 1 and line.startswith("#version")):
            continue
        left, _, right = line.partition(" ")
        if not left or not right or " " in right:
            raise InputRefused(
                f"{folder / 'merges.txt'} line {number} is {line!r}, expected two tokens with a space between; "
                "download it again"
            )
        merges.append((left, right))
    return vocab, merges


def _guarded(folder: Path, build: Callable[[], Tokenizer]) -> Tokenizer:
    """Run the readers of `tokenizers` and transformers, which raise plain Exception for a malformed file."""
    try:
        return build()
    except ImportError as error:
        raise EnvironmentFault(
            f"tokenizer files are read with transformers: {error}; pip install 'dllmc[export]'"
        ) from error
    except (InputRefused, MemoryError):
        raise
    except Exception as error:
        raise InputRefused(
            f"{folder}: the tokenizer files cannot be read ({error}); download them again, and make sure that they are "
            "of one model"
        ) from error


def _listed_tokens(folder: Path, settings: Mapping[str, Any]) -> dict[int, AddedToken]:
    """`added_tokens_decoder` of tokenizer_config.json: token by id, ascending."""
    tokens: dict[int, AddedToken] = {}
    for key, value in settings["added_tokens_decoder"].items():
        if not (key.isascii() and key.isdecimal()):
            raise InputRefused(
                f"{folder / 'tokenizer_config.json'}: added_tokens_decoder has the key {key!r}, expected a token id; "
                "download the file again"
            )
        tokens[int(key)] = _token(folder, f"added_tokens_decoder[{key}]", value)
    return dict(sorted(tokens.items()))


def _older_added_tokens(folder: Path, specials: Mapping[str, AddedToken]) -> dict[int, AddedToken]:
    """added_tokens.json: id by token; one with a role is special."""
    special = {token.content for token in specials.values()}
    tokens: dict[int, AddedToken] = {}
    for content, token_id in _optional(folder / "added_tokens.json").items():
        if type(token_id) is not int or token_id < 0 or token_id in tokens:
            raise InputRefused(
                f"{folder / 'added_tokens.json'}: {content!r} has {token_id!r}, expected an id of its own; "
                "download the file again"
            )
        tokens[token_id] = AddedToken(content, normalized=content not in special, special=content in special)
    return dict(sorted(tokens.items()))


def _special_tokens(folder: Path, roles: Mapping[str, Any]) -> dict[str, AddedToken]:
    """Role -> token, for the roles that have one."""
    return {role: _token(folder, role, roles[role], special=True) for role in SPECIALS if roles.get(role) is not None}


def _extra_tokens(folder: Path, roles: Mapping[str, Any]) -> list[AddedToken]:
    """Special tokens without a role; the key's older name is `additional_special_tokens`."""
    extra = roles.get("extra_special_tokens") or roles.get("additional_special_tokens") or []
    values = list(extra.values()) if isinstance(extra, dict) else extra
    if not isinstance(values, list):
        raise InputRefused(f"{folder}: extra_special_tokens is {extra!r}, expected a list; download the files again")
    return [_token(folder, "an extra special token", value, special=True) for value in values]


def _token(folder: Path, what: str, value: object, *, special: bool = False) -> AddedToken:
    """A token written as its text, or as an object with its flags."""
    if isinstance(value, str):
        value = {"content": value}
    if not isinstance(value, dict) or not isinstance(value.get("content"), str) or not value["content"]:
        raise InputRefused(
            f"{folder}: {what} is {value!r} in the tokenizer files, expected a token's text, or an object with it as "
            "content; download the files again"
        )
    flags = {flag: bool(value.get(flag, False)) for flag in ("lstrip", "rstrip", "single_word", "normalized")}
    return AddedToken(value["content"], special=special or bool(value.get("special", False)), **flags)


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """The Jinja text, never run here: chat_template.jinja, or the (default) template in tokenizer_config.json."""
    path = folder / "chat_template.jinja"
    if path.exists():
        check_link(path)  # any text passes for a template
        return read_text(path)
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}
