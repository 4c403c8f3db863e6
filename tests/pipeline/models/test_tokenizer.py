"""Every layout of tokenizer files gives the ids that transformers gives, or is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

from pipeline.errors import InputRefused
from pipeline.models.tokenizer import TokenizerSource, read_tokenizer
from tests.pipeline.models.folders import edit_json, make_config

CORPUS = "the cat sat on the mat 12 and 34; naïve café 日本 語 \n\n  \tok? yes! it's the user's words"
TEXTS = [
    "",
    " ",
    "the cat sat",
    "  two  spaces\n\n\nand\tlines\r\n",
    "it's 1234567890 O'Neil's",
    "café cafe\u0301 日本語 🙂 \u2028 \x85",
    "<|mask|><|mask|> <|endoftext|>x<tool>y</tool> <|eot|>",
    "a<|eot|> b <|eot|>\nc",
]
ROWS = 600
CONFIG = make_config("dream", embedding_size=ROWS, vocab_size=ROWS)


def trained() -> Tokenizer:
    """A byte-level BPE of the Qwen2 kind with a few merges and no added tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator([CORPUS] * 3, trainer)
    return tokenizer


def flags(content: str, **changes: bool) -> dict[str, Any]:
    off = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
    return {"content": content, **off, **changes}


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def specials(first: int) -> dict[str, dict[str, Any]]:
    return {
        str(first): flags("<|endoftext|>"),
        str(first + 1): flags("<|mask|>"),
        str(first + 2): flags("<tool>", special=False),
        str(first + 3): flags("</tool>", special=False, normalized=True),
        str(first + 4): flags("<|eot|>", lstrip=True, rstrip=True),
    }


def roles() -> dict[str, Any]:
    return {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "mask_token": "<|mask|>", "unk_token": None}


def whole_file(folder: Path) -> None:
    """LLaDA's layout: tokenizer.json, and added tokens named only in tokenizer_config.json."""
    tokenizer = trained()
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "added_tokens_decoder": specials(tokenizer.get_vocab_size()),
            "chat_template": "{{ messages }}",
            **roles(),
        },
    )


def whole_file_alone(folder: Path) -> None:
    """tokenizer.json that holds its added tokens, and nothing beside it."""
    tokenizer = trained()
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", normalized=False), AddedToken("<|mask|>")])
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")


def whole_file_that_adds_eos(folder: Path) -> None:
    """tokenizer_config.json asks for a BOS, but tokenizer.json adds an EOS; it was saved with a length and padding."""
    tokenizer = trained()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    end = tokenizer.token_to_id("<|endoftext|>")
    tokenizer.post_processor = processors.TemplateProcessing(
        "$A <|endoftext|>", special_tokens=[("<|endoftext|>", end)]
    )
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=8)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    settings = {"add_bos_token": True, "bos_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    write_json(folder / "tokenizer_config.json", settings)


def conflicting_flags(folder: Path) -> None:
    """The two files disagree about a token's flags: tokenizer_config.json decides."""
    tokenizer = trained()
    tokenizer.add_tokens([AddedToken("<|eot|>", normalized=True)])
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    decoder = {str(tokenizer.token_to_id("<|eot|>")): flags("<|eot|>", lstrip=True)}
    write_json(folder / "tokenizer_config.json", {"added_tokens_decoder": decoder})


def vocabulary(folder: Path) -> int:
    """vocab.json and merges.txt; returns the first free id."""
    model = json.loads(trained().to_str())["model"]
    write_json(folder / "vocab.json", model["vocab"])
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in model["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    return len(model["vocab"])


def dream_files(folder: Path) -> None:
    """Dream's layout: vocab.json, merges.txt, added tokens three times over, and a class of its own."""
    added = specials(vocabulary(folder))
    write_json(folder / "added_tokens.json", {token["content"]: int(i) for i, token in added.items()})
    write_json(folder / "special_tokens_map.json", {"bos_token": flags("<|beginoftext|>")})
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "DreamTokenizer",
            "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
            "added_tokens_decoder": added,
            "add_prefix_space": False,
            "add_bos_token": False,
            "chat_template": [{"name": "tool", "template": "t"}, {"name": "default", "template": "d"}],
            **roles(),
        },
    )


def dream_files_that_add_bos(folder: Path) -> None:
    dream_files(folder)
    changes = {"add_bos_token": True, "bos_token": "<|mask|>", "add_prefix_space": True}
    edit_json(folder / "tokenizer_config.json", lambda values: values.update(changes))


def older_files(folder: Path) -> None:
    """No added_tokens_decoder: added_tokens.json gives ids, special_tokens_map.json roles."""
    added = specials(vocabulary(folder))
    write_json(folder / "added_tokens.json", {token["content"]: int(i) for i, token in added.items()})
    roles = {"eos_token": flags("<|endoftext|>"), "pad_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    write_json(folder / "special_tokens_map.json", roles | {"mask_token": flags("<|mask|>")})
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "Qwen2Tokenizer"})


LAYOUTS: dict[str, tuple[Callable[[Path], None], Any]] = {
    "llada": (whole_file, PreTrainedTokenizerFast),
    "alone": (whole_file_alone, PreTrainedTokenizerFast),
    "adds eos": (whole_file_that_adds_eos, PreTrainedTokenizerFast),
    "conflicting flags": (conflicting_flags, PreTrainedTokenizerFast),
    "dream": (dream_files, Qwen2Tokenizer),
    "dream that adds bos": (dream_files_that_add_bos, Qwen2Tokenizer),
    "older": (older_files, Qwen2Tokenizer),
}


@pytest.fixture(scope="module", params=LAYOUTS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[TokenizerSource, Any]:
    """What we read from a folder, and what transformers makes of it."""
    write, kind = LAYOUTS[request.param]
    folder = tmp_path_factory.mktemp("tokenizer")
    write(folder)
    return read_tokenizer(folder, CONFIG), kind.from_pretrained(str(folder), local_files_only=True)


def assert_same(pair: tuple[TokenizerSource, Any], text: str) -> None:
    ours, theirs = pair[0].parsed(), pair[1]
    ids = ours.encode(text).ids
    assert ids == theirs(text)["input_ids"]
    for skip in (False, True):
        plain = theirs.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
        assert ours.decode(ids, skip_special_tokens=skip) == plain


@pytest.mark.parametrize("text", TEXTS)
def test_ids_and_text_are_those_of_transformers(pair: tuple[TokenizerSource, Any], text: str) -> None:
    assert_same(pair, text)


@given(
    parts=st.lists(
        st.text(max_size=8) | st.sampled_from(["<|mask|>", "<tool>", "</tool>", "<|eot|>", " ", "\n"]), max_size=6
    )
)
@settings(max_examples=25, deadline=None)
def test_any_text_gives_the_ids_of_transformers(pair: tuple[TokenizerSource, Any], parts: list[str]) -> None:
    assert_same(pair, "".join(parts))


def test_facts_of_dreams_layout(tmp_path: Path) -> None:
    dream_files(tmp_path)
    first = len(json.loads((tmp_path / "vocab.json").read_text()))
    source = read_tokenizer(tmp_path, CONFIG)
    assert source.special_ids == {"eos_token": first, "pad_token": first, "mask_token": first + 1}
    assert source.id_limit == first + 5
    assert source.chat_template == "d"
    (tmp_path / "chat_template.jinja").write_text("from a file")
    assert read_tokenizer(tmp_path, CONFIG).chat_template == "from a file"


def test_the_same_files_give_the_same_bytes(tmp_path: Path) -> None:
    dream_files(tmp_path)
    assert read_tokenizer(tmp_path, CONFIG).text == read_tokenizer(tmp_path, CONFIG).text


def settings_of(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    return lambda folder: edit_json(folder / "tokenizer_config.json", change)


SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing": (lambda d: [p.unlink() for p in d.iterdir()], r"no tokenizer: found neither tokenizer\.json nor vocab"),
    "no merges": (lambda d: (d / "merges.txt").unlink(), r"neither tokenizer\.json nor merges\.txt"),
    "other class": (
        settings_of(lambda v: v.update(tokenizer_class="GPT2Tokenizer")),
        "tokenizer_class is 'GPT2Tokenizer'.*expected one of DreamTokenizer",
    ),
    "splits special tokens": (
        settings_of(lambda v: v.update(split_special_tokens=True)),
        "split_special_tokens is true",
    ),
    "vocabulary of texts": (lambda d: write_json(d / "vocab.json", {"a": "0"}), r"vocab\.json must map tokens to ids"),
    "merge of three": (lambda d: (d / "merges.txt").write_text("a b c\n"), r"merges\.txt line 1 is 'a b c'"),
    "merge of unknown": (lambda d: (d / "merges.txt").write_text("qqq zzz\n"), "the tokenizer files cannot be read"),
    "hole before an added token": (
        settings_of(lambda v: v["added_tokens_decoder"].update({"590": flags("<far>")})),
        r"'<far>' has id 590 in its tokenizer files, but gets \d+",
    ),
    "added token with another id": (
        settings_of(lambda v: v["added_tokens_decoder"].update({"331": flags("a")})),
        r"'a' has id 331 in its tokenizer files, but gets \d+",
    ),
    "added token without id": (
        settings_of(lambda v: v["added_tokens_decoder"].update({"x": flags("<x>")})),
        "added_tokens_decoder has the key 'x'",
    ),
    "added token without text": (
        settings_of(lambda v: v["added_tokens_decoder"].update({"331": {"special": True}})),
        r"added_tokens_decoder\[331\] is \{'special': True\}",
    ),
    "role of a number": (settings_of(lambda v: v.update(eos_token=3)), "eos_token is 3 in the tokenizer files"),
    "two tokens, one id": (
        lambda d: (
            edit_json(d / "tokenizer_config.json", lambda v: v.pop("added_tokens_decoder")),
            write_json(d / "added_tokens.json", {"<a>": 330, "<b>": 330}),
        ),
        "'<b>' has 330, expected an id of its own",
    ),
    "whole file not JSON": (lambda d: (d / "tokenizer.json").write_text("{"), "the tokenizer files cannot be read"),
    "whole file of another kind": (
        lambda d: (d / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "Nonsense"}}'),
        "the tokenizer files cannot be read",
    ),
    "settings not JSON": (lambda d: (d / "tokenizer_config.json").write_text("{"), "is not valid JSON"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_spoilt_tokenizer_files_are_refused(tmp_path: Path, case: str) -> None:
    dream_files(tmp_path)
    read_tokenizer(tmp_path, CONFIG)
    spoil, words = SPOILT[case]
    spoil(tmp_path)
    with pytest.raises(InputRefused, match=words):
        read_tokenizer(tmp_path, CONFIG)


def test_more_tokens_than_embedding_rows_are_refused(tmp_path: Path) -> None:
    dream_files(tmp_path)
    limit = read_tokenizer(tmp_path, CONFIG).id_limit
    assert read_tokenizer(tmp_path, make_config("llada", embedding_size=limit, vocab_size=limit)).id_limit == limit
    with pytest.raises(
        InputRefused, match=rf"the id {limit - 1}, but config\.json describes only {limit - 1} embedding"
    ):
        read_tokenizer(tmp_path, make_config("llada", embedding_size=limit - 1, vocab_size=limit - 1))
