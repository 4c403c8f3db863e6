"""What the loop must know of a model, read from the `config.json` of a bundle, and what a user may choose."""

from __future__ import annotations

import difflib
import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import InputRefused, UsageFault
from pipeline.runner.policies import POLICIES

if TYPE_CHECKING:
    from pipeline.models.config import ModelConfig

CONFIG_VERSION = 1
MOST = 2**31 - 1  # of anything that is counted, so that sums of such numbers are int64
LOWEST_TEMPERATURE = 1e-3  # below it logits / T leaves the range of float32
EOS_MODES = ("none", "forbid", "last", "threshold")


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """How to denoise.

    `gen_length` None lets the canvas grow block by block until an end-of-text; `steps` None means one step a token at
    most. `refresh_every` counts blocks between full passes, `vicinity` the rows left and right of the block that a
    block pass recomputes too; `exact` makes every pass a full one. `guidance` 0 is none. `monitor` adds a block pass
    before each refresh and reports how far the two agree; it changes no token.
    """

    gen_length: int | None = 32
    block_length: int = 32
    steps: int | None = None
    policy: str = "threshold"
    threshold: float = 0.9
    factor: float = 1.0
    entropy_bound: float = 0.1
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    repetition_penalty: float = 1.0
    eos: str = "none"
    eos_threshold: float = 0.9
    edit: float | None = None
    exact: bool = False
    refresh_every: int = 1
    vicinity: tuple[int, int] = (15, 0)  # the end of the prompt; with the row before a shifted block, 16
    guidance: float = 0.0
    stop: tuple[str, ...] = ()
    monitor: bool = False

    def check(self) -> None:
        """Raise UsageFault for a value that cannot be meant."""
        for name in ("gen_length", "block_length", "steps", "refresh_every"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= MOST:
                raise UsageFault(f"{name} is {value}; expected 1 to {MOST}")
        self._check_names()
        self._check_numbers()
        if self.steps is not None and self.gen_length is None:
            raise UsageFault(f"steps is {self.steps} without a gen_length to share them over; pass gen_length, too")
        if isinstance(self.stop, str):
            raise UsageFault(f"stop is one text, {self.stop!r}; expected a tuple of texts, pass ({self.stop!r},)")
        if "" in self.stop:
            raise UsageFault("stop holds an empty text, which would stop every answer at once; leave it out")

    def _check_names(self) -> None:
        if self.policy not in POLICIES:
            near = difflib.get_close_matches(self.policy, POLICIES, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UsageFault(f"unknown policy {self.policy!r}; known: {', '.join(POLICIES)}{hint}")
        if self.eos not in EOS_MODES:
            raise UsageFault(f"unknown eos mode {self.eos!r}; known: {', '.join(EOS_MODES)}")

    def _check_numbers(self) -> None:
        for name in ("threshold", "top_p", "eos_threshold", "edit"):
            value = getattr(self, name)
            if value is not None and not 0.0 < value <= 1.0:
                raise UsageFault(f"{name} is {value}; expected more than 0 and at most 1")
        for name in ("factor", "repetition_penalty"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise UsageFault(f"{name} is {getattr(self, name)}; expected more than 0")
        for name in ("entropy_bound", "guidance"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise UsageFault(f"{name} is {getattr(self, name)}; expected 0 or more")
        if not 0 <= min(self.vicinity) <= max(self.vicinity) <= MOST:
            raise UsageFault(f"vicinity is {self.vicinity}; expected 0 to {MOST} rows left and right")
        if not (self.temperature == 0.0 or LOWEST_TEMPERATURE <= self.temperature < math.inf):
            raise UsageFault(
                f"temperature is {self.temperature}; expected 0 (the best token) or at least {LOWEST_TEMPERATURE}"
            )
        if not 0 <= self.seed < 2**63:
            raise UsageFault(f"seed is {self.seed}; expected 0 to 2^63 - 1")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Constants of one model; `embedding_size` is V, the rows of its LM head."""

    mask_id: int
    eos_id: int
    pad_id: int
    shifted_logits: bool
    max_length: int
    vocab_size: int
    embedding_size: int
    top_k: int
    generation: GenerateOptions = field(default_factory=GenerateOptions)

    @classmethod
    def of_model(cls, config: ModelConfig, *, top_k: int = 8, generation: GenerateOptions | None = None) -> Settings:
        """The settings of a model whose configuration is at hand."""
        shared = {f.name: getattr(config, f.name) for f in fields(cls) if f.name not in ("top_k", "generation")}
        return cls(**shared, top_k=top_k, generation=generation or GenerateOptions())

    def as_json(self) -> dict[str, Any]:
        """The content of `config.json`; `read_settings` is its inverse."""
        return {"dllmc_config": CONFIG_VERSION, **asdict(self)}


def read_settings(path: Path) -> Settings:
    """Settings from the `config.json` of a bundle; raises InputRefused."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputRefused(f"{path} is missing; is this the folder that `dllmc export` wrote?") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as fault:
        raise InputRefused(f"{path} cannot be read as JSON: {fault}") from None
    if not isinstance(content, dict) or content.pop("dllmc_config", None) != CONFIG_VERSION:
        raise InputRefused(f'{path} is not a runner configuration: expected an object with "dllmc_config": 1')
    where = f"{path}: generation"
    try:
        generation = read_options(content.pop("generation", {}))
        where = f"{path}"
        settings = Settings(**_checked(content, Settings), generation=generation)
    except UsageFault as fault:
        raise InputRefused(f"{where}: {fault}") from None
    _check_sizes(settings, path)
    return settings


def read_options(content: Any) -> GenerateOptions:
    """The options that an object of JSON or YAML names, the others at their defaults; raises UsageFault."""
    if not isinstance(content, dict):
        raise UsageFault(f"found {content!r}; expected an object")
    options = GenerateOptions(**_checked(content, GenerateOptions))
    options.check()
    return options


# Annotations are strings here (PEP 563), which is what makes these tables possible on every Python.
_TYPES: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "int | None": (int, type(None)),
    "bool": (bool,),
    "float": (float, int),
    "float | None": (float, int, type(None)),
    "str": (str,),
}
# Lists of JSON: the type of an element and how many there are, None for any number.
_LISTS: dict[str, tuple[type, int | None]] = {
    "tuple[int, int]": (int, 2),
    "tuple[str, ...]": (str, None),
}
_WORDS = {
    "int": "a whole number",
    "int | None": "a whole number or null",
    "bool": "true or false",
    "float": "a number",
    "float | None": "a number or null",
    "str": "a text",
    "tuple[int, int]": "a list of two whole numbers",
    "tuple[str, ...]": "a list of texts",
}


def _checked(content: dict[str, Any], target: type[Settings | GenerateOptions]) -> dict[str, Any]:
    wanted = {f.name: f for f in fields(target) if f.name != "generation"}
    if unknown := [name for name in content if name not in wanted]:
        near = difflib.get_close_matches(str(unknown[0]), wanted, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(wanted)}"
        raise UsageFault(f"unknown key {unknown[0]!r}; {hint}")
    if target is Settings and (missing := [name for name in wanted if name not in content]):
        raise UsageFault(f"key {missing[0]!r} is missing")
    for name, value in content.items():
        kind = str(wanted[name].type)
        if not (_is_list(value, *_LISTS[kind]) if kind in _LISTS else _is_scalar(value, kind)):
            raise UsageFault(f"{name} is {value!r}; expected {_WORDS[kind]}")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in content.items()}


def _is_scalar(value: Any, kind: str) -> bool:
    return isinstance(value, _TYPES[kind]) and (not isinstance(value, bool) or kind == "bool")


def _is_list(value: Any, element: type, count: int | None) -> bool:
    return isinstance(value, list) and count in (None, len(value)) and all(type(each) is element for each in value)


def _check_sizes(settings: Settings, path: Path) -> None:
    for name in ("max_length", "vocab_size", "embedding_size", "top_k"):
        if getattr(settings, name) < 1:
            raise InputRefused(f"{path}: {name} is {getattr(settings, name)}; expected 1 or more")
    if settings.vocab_size > settings.embedding_size:
        raise InputRefused(
            f"{path}: vocab_size {settings.vocab_size} is more than embedding_size {settings.embedding_size}"
        )
    for name in ("mask_id", "eos_id", "pad_id"):
        if not 0 <= getattr(settings, name) < settings.embedding_size:
            raise InputRefused(
                f"{path}: {name} is {getattr(settings, name)}; expected 0 to {settings.embedding_size - 1}"
            )
    if settings.mask_id == settings.eos_id:
        raise InputRefused(f"{path}: mask_id and eos_id are both {settings.mask_id}; expected two different ids")
