"""Other problems in another vocabulary, for the model that no method was tuned on.

Nothing of `problems.py` is asked here, and words and digits share other tokens: what a recipe gains on the reference
models it should gain on this one, too.
"""

import random
from itertools import islice, pairwise

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from pipeline.tiny.problems import Maker, problems

VOCABULARY = 480  # the 256 bytes, then pieces of the problems' own text
TOKENIZER_TEXTS = 3000
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
NUMERALS = {
    1000: "M",
    900: "CM",
    500: "D",
    400: "CD",
    100: "C",
    90: "XC",
    50: "L",
    40: "XL",
    10: "X",
    9: "IX",
    5: "V",
    4: "IV",
    1: "I",
}
PEOPLE = ("Ines", "Olaf", "Ruth", "Karl", "Nora", "Hugo", "Vera", "Finn")
ORDERS = (("taller", "tallest"), ("older", "oldest"), ("faster", "fastest"), ("richer", "richest"))
MONTHS = (
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
)


def roman(draw: random.Random) -> tuple[str, str]:
    """A number in Roman numerals: `Roman 1987` -> `MCMLXXXVII`."""
    number = draw.randint(1, 3999)
    left, numerals = number, ""
    for value, numeral in NUMERALS.items():
        numerals += numeral * (left // value)
        left %= value
    return f"Roman {number}", numerals


def date(draw: random.Random) -> tuple[str, str]:
    """A date in words becomes ISO 8601: `7 March 2031` -> `2031-03-07`."""
    day, month, year = draw.randint(1, 28), draw.randint(1, 12), draw.randint(1950, 2049)
    return f"ISO date of {day} {MONTHS[month - 1]} {year}", f"{year}-{month:02d}-{day:02d}"


def expand(draw: random.Random) -> tuple[str, str]:
    """Run lengths written out: `unpack B3K1A2` -> `BBBKAA`."""
    letters = draw.sample(LETTERS, draw.randint(3, 5))
    runs = [(letter, draw.randint(1, 4)) for letter in letters]
    return f"unpack {''.join(f'{letter}{count}' for letter, count in runs)}", "".join(a * n for a, n in runs)


def ladder(draw: random.Random) -> tuple[str, str]:
    """An order from comparisons told out of order, the greatest first: `Ruth, Olaf, Ines`."""
    people = draw.sample(PEOPLE, draw.randint(3, 4))
    more, most = draw.choice(ORDERS)
    told = [f"{a} is {more} than {b}." for a, b in pairwise(people)]
    draw.shuffle(told)
    return f"{' '.join(told)} Rank them, {most} first.", ", ".join(people)


def shift(draw: random.Random) -> tuple[str, str]:
    """Every letter one or two further in the alphabet, around its end: `ROT2 HAZY` -> `JCBA`."""
    by = draw.randint(1, 2)
    word = "".join(draw.choice(LETTERS) for _ in range(draw.randint(4, 9)))
    return f"ROT{by} {word}", "".join(LETTERS[(LETTERS.index(letter) + by) % 26] for letter in word)


def count(draw: random.Random) -> tuple[str, str]:
    """How often each of two letters stands in a word, the first asked first: `P=2 Q=3`."""
    first, second = draw.sample(LETTERS, 2)
    word = "".join(draw.choice((first, second)) for _ in range(draw.randint(3, 9)))
    return f"How many {first} and {second} has {word}?", f"{first}={word.count(first)} {second}={word.count(second)}"


UNSEEN_KINDS: dict[str, Maker] = {
    "roman": roman,
    "date": date,
    "expand": expand,
    "ladder": ladder,
    "shift": shift,
    "count": count,
}


def train_unseen_tokenizer(special_tokens: list[str]) -> Tokenizer:
    """Byte-level BPE of the problems' own text, digits and capitals single; special tokens stand last."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    words = Regex(r" ?\p{Lu}?\p{Ll}+|\p{N}| ?[^\s\p{L}\p{N}]+|\p{Lu}|\s+(?!\S)|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        min_frequency=2,
        show_progress=False,
    )
    drawn = islice(problems(0, held_out=False, kinds=UNSEEN_KINDS), TOKENIZER_TEXTS)
    tokenizer.train_from_iterator((text for problem in drawn for text in (problem.prompt, problem.answer)), trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special_tokens])
    return tokenizer
