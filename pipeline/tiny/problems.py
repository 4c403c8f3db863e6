"""Generated problems whose answers can be checked: the corpus of the reference models and of calibration.

Every problem is a function of one seeded generator; train and held-out sets are disjoint by the hash of the prompt.
The worked answers are chains of small steps, so that one wrong token anywhere spoils the whole answer.
"""

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

NAMES = ("Tom", "Ana", "Ben", "Eva", "Max", "Lea", "Sam", "Mia")
THINGS = ("pens", "nuts", "cups", "eggs", "keys", "figs", "hats", "maps")
LETTERS = "abcdefghijklmnopqrstuvwxyz"
HELD_OUT_SHARE = 16  # one prompt in this many is kept for evaluation


@dataclass(frozen=True)
class Problem:
    """One prompt with its only right answer; `kind` names the generator."""

    kind: str
    prompt: str
    answer: str


def add(draw: random.Random) -> tuple[str, str]:
    """Three-digit sum, worked digit by digit with its carries: `547+985=` -> `7+5=12;4+8+1=13;5+9+1=15;1532`."""
    a, b = draw.randint(100, 999), draw.randint(100, 999)
    carry, steps = 0, []
    for place in (1, 10, 100):
        left, right = a // place % 10, b // place % 10
        carried = f"+{carry}" if place > 1 else ""
        steps.append(f"{left}+{right}{carried}={left + right + carry:02d}")
        carry = (left + right + carry) // 10
    return f"{a}+{b}=", f"{';'.join(steps)};{a + b}"


def story(draw: random.Random) -> tuple[str, str]:
    """Word problem with two changes: `4+5=9;9-3=6`."""
    name, thing = draw.choice(NAMES), draw.choice(THINGS)
    have, gain = draw.randint(1, 9), draw.randint(1, 9)
    if draw.random() < 0.5:
        total = have + gain
        loss = draw.randint(1, min(9, total))
        text = f"{name} has {have} {thing}, buys {gain} and gives {loss} away. How many {thing}?"
        return text, f"{have}+{gain}={total};{total}-{loss}={total - loss}"
    loss = draw.randint(1, have)
    rest = have - loss
    text = f"{name} had {have} {thing}, lost {loss} and found {gain}. How many {thing}?"
    return text, f"{have}-{loss}={rest};{rest}+{gain}={rest + gain}"


def sort(draw: random.Random) -> tuple[str, str]:
    """Five to eight digits in ascending order."""
    digits = [draw.randint(0, 9) for _ in range(draw.randint(5, 8))]
    return f"sort {' '.join(map(str, digits))}:", " ".join(map(str, sorted(digits)))


def copy(draw: random.Random) -> tuple[str, str]:
    """A random word of letters and digits, repeated exactly."""
    word = "".join(draw.choice(LETTERS + "0123456789") for _ in range(draw.randint(6, 14)))
    return f"copy {word}:", word


def reverse(draw: random.Random) -> tuple[str, str]:
    """Five to nine digits, last first."""
    digits = [str(draw.randint(0, 9)) for _ in range(draw.randint(5, 9))]
    return f"reverse {' '.join(digits)}:", " ".join(reversed(digits))


def record(draw: random.Random) -> tuple[str, str]:
    """Format following: named fields become a JSON object, in the order given."""
    names = draw.sample(LETTERS, draw.randint(2, 4))
    values = [draw.randint(0, 99) for _ in names]
    fields = " ".join(f"{n} {v}" for n, v in zip(names, values, strict=True))
    body = ",".join(f'"{n}":{v}' for n, v in zip(names, values, strict=True))
    return f"json {fields}:", "{" + body + "}"


Maker = Callable[[random.Random], tuple[str, str]]

KINDS: dict[str, Maker] = {
    "add": add,
    "story": story,
    "sort": sort,
    "copy": copy,
    "reverse": reverse,
    "record": record,
}


def is_held_out(prompt: str) -> bool:
    """True for the one prompt in `HELD_OUT_SHARE` that training never sees."""
    return hashlib.sha256(prompt.encode()).digest()[0] % HELD_OUT_SHARE == 0


def problems(seed: int, *, held_out: bool, kinds: Mapping[str, Maker] = KINDS) -> Iterator[Problem]:
    """Endless stream of problems, kinds in turn; equal seeds give equal streams."""
    draw = random.Random(seed)
    while True:
        for kind, make in kinds.items():
            while True:
                prompt, answer = make(draw)
                if is_held_out(prompt) == held_out:
                    yield Problem(kind, prompt, answer)
                    break


def fingerprint(kinds: Mapping[str, Maker] = KINDS) -> str:
    """Eight hexadecimal digits that tell one set of generators from another."""
    drawn = (f"{p.prompt}{p.answer}\n" for p in islice(problems(0, held_out=False, kinds=kinds), 600))
    return hashlib.sha256("".join(drawn).encode()).hexdigest()[:8]


def held_out(count: int, seed: int = 0, kinds: Mapping[str, Maker] = KINDS) -> list[Problem]:
    """`count` different held-out problems, kinds in turn."""
    found: dict[str, Problem] = {}
    for problem in problems(seed, held_out=True, kinds=kinds):
        found.setdefault(problem.prompt, problem)
        if len(found) == count:
            break
    return list(found.values())
