"""The reference models' tokenizers: byte-level BPE over the problems' words, digits always single.

The pre-tokenizer is the one that Qwen2 (and so Dream) uses; only the words that every problem of a kind shares become
merges, so that any text can be encoded and the random parts stay one token a character.
"""

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from pipeline.tiny.problems import NAMES, THINGS

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SHARED_WORDS = "sort copy reverse json has buys and gives away. How many had lost found"


def train_tokenizer(special_tokens: list[str]) -> Tokenizer:
    """Byte-level BPE whose merges spell the shared words; special tokens take the ids after the vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        min_frequency=1,
        show_progress=False,
    )
    first = " ".join((*SHARED_WORDS.split()[:4], *NAMES))  # words that open a prompt have no space before them
    rest = " " + " ".join((*SHARED_WORDS.split()[4:], *THINGS))
    tokenizer.train_from_iterator([*first.split(), rest], trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special_tokens])
    return tokenizer
