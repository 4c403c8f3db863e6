"""What a study consists of: its cells, the recipe of each, and why a cell is impossible."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from passes.methods import METHODS
from pipeline.errors import UsageFault
from pipeline.recipe import Recipe
from pipeline.recipe_file import BUILTIN_FOLDER, BUILTIN_RECIPES, apply_setting, parse_recipe, parse_yaml

FULL = "full"  # the method of the cell that everything is compared with: float32, nothing quantised
FULL_BITS = "float32"
STATES = ("noised", "clean")
QUANTISING = tuple(name for name in METHODS if name != "none")

# The study's granularity: groups of 128 with a zero point where only weights are quantised, else per channel and token.
BITS: dict[str, dict[str, int | bool]] = {
    "w8a8": {"w_bits": 8, "a_bits": 8, "w_group": 0, "a_group": 0},
    "w4a16": {"w_bits": 4, "a_bits": 16, "w_group": 128, "w_symmetric": False, "a_group": 0},
    "w3a16": {"w_bits": 3, "a_bits": 16, "w_group": 128, "w_symmetric": False, "a_group": 0},
    "w4a8": {"w_bits": 4, "a_bits": 8, "w_group": 0, "a_group": 0},
    "w4a4": {"w_bits": 4, "a_bits": 4, "w_group": 0, "a_group": 0},
    "w4a4g128": {"w_bits": 4, "a_bits": 4, "w_group": 128, "a_group": 128},
}

# Recipe keys that name the cell, and those that the study has options of its own for.
DECIDED = {
    "method": "--methods",
    "name": "--methods",
    "linear.w_bits": "--bits",
    "linear.a_bits": "--bits",
    "calibration.states": "--states",
    "calibration.seed": "--seeds",
    "threads": "--threads",
}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One quantised model of the grid; `states` is empty for a method that reads no activations."""

    model: str
    method: str
    bits: str
    states: str = ""
    seed: int = 0
    variant: str = ""

    @property
    def label(self) -> str:
        """`tiny-llada gptq w4a4 noised seed 1`, and the variant where it is one."""
        seed = f"seed {self.seed}" if self.states else ""
        parts = (short_name(self.model), self.method, self.bits, self.states, seed, self.variant)
        return " ".join(filter(None, parts))


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A built-in recipe, whose name ends with its bits, with settings of its own."""

    recipe: str
    sets: tuple[str, ...] = ()

    @property
    def bits(self) -> str:
        return self.recipe.rpartition("-")[2]


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The question: `seeds` by bits; `sets` are recipe settings for every cell, `threads` those of one cell.

    `variants` by label stand beside the methods, or alone; each is compared with the first of them, too.
    """

    methods: tuple[str, ...] = ()
    bits: tuple[str, ...] = ()
    variants: Mapping[str, Variant] = field(default_factory=dict)
    states: tuple[str, ...] = STATES[:1]
    seeds: Mapping[str, int]
    sets: tuple[str, ...] = ()
    threads: int = 1

    def check(self) -> None:
        """Raise UsageFault for a name that is none, or a setting that the study itself decides."""
        if self.methods or self.bits or not self.variants:
            known(self.methods, QUANTISING, "method", "--methods")
            known(self.bits, BITS, "format", "--bits")
        known(self.states, STATES, "kind of states", "--states")
        for variant in self.variants.values():
            known([variant.recipe], BUILTIN_RECIPES, "recipe", "a variant")
            known([variant.bits], BITS, "format", f"a variant of {variant.recipe}")
        for setting in (*self.sets, *(setting for variant in self.variants.values() for setting in variant.sets)):
            key = setting.partition("=")[0].strip().replace("-", "_")
            if key in DECIDED:
                raise UsageFault(f"--set {setting} is decided by the study; pass {DECIDED[key]} instead")
            apply_setting({}, setting)

    def cells(self, model: str) -> Iterator[Cell]:
        """Full precision first; methods that read no activations have one cell, whatever the states and seeds."""
        yield Cell(model=model, method=FULL, bits=FULL_BITS)
        for bits in self.bits:
            for method in self.methods:
                yield from self._drawn(Cell(model=model, method=method, bits=bits))
        for label, variant in self.variants.items():
            method = str(_builtin(variant.recipe)["method"])
            yield from self._drawn(Cell(model=model, method=method, bits=variant.bits, variant=label))

    def _drawn(self, cell: Cell) -> Iterator[Cell]:
        if not METHODS[cell.method].needs_calibration:
            yield cell
            return
        for states in self.states:
            for seed in range(self.seeds[cell.bits]):
                yield replace(cell, states=states, seed=seed)

    def recipe(self, cell: Cell) -> Recipe:
        """The cell's recipe: the built-in one of its method, with the bits of the study. Raises UsageFault."""
        sets = [*self.sets]
        if cell.variant:
            variant = self.variants[cell.variant]
            data = _builtin(variant.recipe)
            sets += variant.sets
        else:
            data = _template(cell)
            data["name"], data["method"] = f"{cell.method}-{cell.bits}", cell.method
            data["linear"] = data.get("linear", {}) | BITS[cell.bits]
        data["threads"] = self.threads
        if cell.states:
            sets += [f"calibration.states={cell.states}", f"calibration.seed={cell.seed}"]
        return parse_recipe(yaml.safe_dump(data), f"recipe {data['name']!r}", sets)


def short_name(model: str) -> str:
    """`tiny-llada` of `builtin:tiny-llada` and of `models/tiny-llada`."""
    return Path(model.rpartition(":")[2]).name or model


def known(names: Iterable[str], table: Iterable[str], what: str, option: str) -> None:
    """Raise UsageFault, naming the nearest, unless every name is in the table and stands once."""
    seen: set[str] = set()
    for name in names:
        if name not in table:
            near = difflib.get_close_matches(name, list(table), n=1, cutoff=0)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UsageFault(f"unknown {what} {name!r}; {option} takes {', '.join(table)}{hint}")
        if name in seen:
            raise UsageFault(f"{option} names {name} twice")
        seen.add(name)
    if not seen:
        raise UsageFault(f"{option} is empty; it takes {', '.join(table)}")


def parse_seeds(text: str, bits: Sequence[str]) -> dict[str, int]:
    """Number of seeds by bits from `1` or `1,w4a4=3`; raises UsageFault."""
    words = [word.strip() for word in text.split(",")]
    seeds = dict.fromkeys(bits, 1)
    for word in sorted(words, key=lambda word: "=" in word):  # the number for all bits, wherever it stands, comes first
        name, sign, count = word.rpartition("=")
        if not count.isdecimal() or not 1 <= int(count) <= 1000:
            raise UsageFault(f"--seeds {text!r} is not a number of seeds, or one for some bits, such as 1,w4a4=3")
        if sign and name not in bits:
            raise UsageFault(f"--seeds {text!r} names {name!r}, which is not among --bits {','.join(bits)}")
        seeds.update(dict.fromkeys([name] if sign else bits, int(count)))
    return seeds


def _template(cell: Cell) -> dict[str, Any]:
    """The built-in recipe of the same name, else the method's for formats of the same kind, else plain settings."""
    float_activations = BITS[cell.bits]["a_bits"] == 16
    of_method = [name for name in BUILTIN_RECIPES if name.startswith(f"{cell.method}-")]
    alike = [name for name in of_method if name.endswith("a16") == float_activations]
    for name in (f"{cell.method}-{cell.bits}", *alike):
        if name in of_method:
            return _builtin(name)
    return {"schema_version": 1, "head": {"bits": 8}}


def _builtin(name: str) -> dict[str, Any]:
    text = (BUILTIN_FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    data: dict[str, Any] = parse_yaml(text, f"recipe {name!r}")
    return data
