"""Recipes in and out of YAML: built-in names, files, `--set a.b=value`, and errors that name the nearest key."""

from __future__ import annotations

import difflib
import re
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from pipeline.errors import InputRefused, UsageFault
from pipeline.recipe import Recipe

BUILTIN_FOLDER = Path(__file__).parent / "recipes"
WEIGHT_ONLY, INTEGER = ("w4a16", "w3a16"), ("w8a8", "w4a8", "w4a4")
BUILTIN_FORMATS = {
    "rtn": (*INTEGER, *WEIGHT_ONLY),
    "smoothquant": INTEGER,
    "awq": (*INTEGER, *WEIGHT_ONLY),
    "gptq": (*INTEGER, *WEIGHT_ONLY),
    "quarot": INTEGER,
    "duquant": INTEGER,
    "flatquant": INTEGER,
    "freeact": INTEGER,
    "star": ("w8a8", "w4a4"),
}
VARIANTS = ("star-plus-w4a4",)  # settings of a method that has a recipe of its own name at these bits
BUILTIN_RECIPES = (
    "fp16",
    *(f"{method}-{bits}" for method, formats in BUILTIN_FORMATS.items() for bits in formats),
    *VARIANTS,
)
MAX_BYTES = 65536


class _Loader(yaml.SafeLoader):
    """Plain data only: no aliases (they expand without bound), no duplicate keys, no dates, text keys."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "aliases are not allowed", self.get_mark())
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is not text", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} appears twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


# YAML 1.1 reads 1e-5 as text and 2026-01-01 as a date; a recipe means a number and text.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def parse_yaml(text: str, what: str) -> Any:
    """Plain data of one YAML document; `what` names it in the UsageFault."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as fault:
        raise UsageFault(f"{what} is not valid YAML: {' '.join(str(fault).split())}") from fault
    except (RecursionError, ValueError) as fault:
        raise UsageFault(f"{what} is not valid YAML: {type(fault).__name__}: {fault}") from fault


def load_recipe(name_or_file: str, sets: Sequence[str] = ()) -> Recipe:
    """The recipe of this built-in name or YAML file with the `a.b=value` settings applied, checked; or UsageFault."""
    path = _find(name_or_file)
    try:
        with path.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
        text = content.decode("utf-8")
    except (OSError, UnicodeDecodeError) as fault:
        raise UsageFault(f"recipe {name_or_file!r} cannot be read: {fault}") from fault
    if len(content) > MAX_BYTES:
        raise UsageFault(f"recipe {name_or_file!r} has more than {MAX_BYTES} bytes; a recipe is one page")
    return parse_recipe(text, f"recipe {name_or_file!r}", sets)


def parse_recipe(text: str, what: str, sets: Sequence[str] = ()) -> Recipe:
    """A recipe from YAML text; `what` names it in the UsageFault."""
    data = parse_yaml(text, what)
    if not isinstance(data, dict):
        raise UsageFault(f"{what} must be a mapping of keys to values; found {type(data).__name__}")
    for setting in sets:
        apply_setting(data, setting)
    try:
        return Recipe.model_validate(data)
    except ValidationError as fault:
        raise UsageFault(f"{what}: {'; '.join(_describe(error) for error in fault.errors())}") from fault


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML; `parse_recipe` reads it back equal."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100)


def read_resolved(path: Path) -> Recipe:
    """The recipe that a bundle or work folder carries; InputRefused when it is damaged."""
    try:
        return parse_recipe(path.read_text(encoding="utf-8"), f"the recipe {path.name}")
    except (UsageFault, OSError, UnicodeDecodeError) as fault:
        raise InputRefused(f"{path} is not a resolved recipe: {fault}") from fault


def apply_setting(data: dict[str, Any], setting: str) -> None:
    """Apply `a.b=value` in place, the value read as YAML; UsageFault names an unknown key's nearest neighbour."""
    dotted, sign, value = setting.partition("=")
    keys = dotted.strip().replace("-", "_").split(".")
    if not sign or not all(keys):
        raise UsageFault(f"--set {setting!r} is not of the form part.field=value, e.g. --set linear.w_group=64")
    _check_known(keys)
    section = data
    for key in keys[:-1]:
        section = section.setdefault(key, {})
        if not isinstance(section, dict):
            raise UsageFault(f"--set {setting!r}: {key!r} in the recipe is {section!r}, not a section")
    section[keys[-1]] = parse_yaml(value, f"the value of --set {dotted}")


def _find(name_or_file: str) -> Path:
    if name_or_file in BUILTIN_RECIPES:
        return BUILTIN_FOLDER / f"{name_or_file}.yaml"
    path = Path(name_or_file)
    try:
        if path.is_file():
            return path
    except (OSError, ValueError) as fault:
        raise UsageFault(f"recipe {name_or_file!r} is neither a built-in name nor a file: {fault}") from fault
    raise UsageFault(
        f"recipe {name_or_file!r} is neither a built-in name nor a file{_nearest(name_or_file, BUILTIN_RECIPES)}; "
        f"`dllmc recipe list` shows the built-in ones"
    )


def _keys(section: type) -> dict[str, Any]:
    """The keys of a section and the type of each."""
    if is_dataclass(section):
        return {each.name: each.type for each in fields(section)}
    assert issubclass(section, BaseModel)
    return {name: each.annotation for name, each in section.model_fields.items()}


def _section(keys: Sequence[str | int]) -> type | None:
    """The class that this path of keys leads to; None for a plain field or an unknown key."""
    section: type = Recipe
    for key in keys:
        inner = _keys(section).get(str(key))
        if not (isinstance(inner, type) and (is_dataclass(inner) or issubclass(inner, BaseModel))):
            return None
        section = inner
    return section


def _dotted_names(section: type = Recipe, prefix: str = "") -> list[str]:
    names = []
    for key in _keys(section):
        inner = _section([*prefix.split(".")[:-1], key])
        names.append(prefix + key)
        names += _dotted_names(inner, f"{prefix}{key}.") if inner else []
    return names


def _check_known(keys: Sequence[str]) -> None:
    for depth, key in enumerate(keys):
        section = _section(keys[:depth])
        if section is None:
            raise UsageFault(f"recipe key {'.'.join(keys[:depth])!r} is a value, it has no {key!r} inside")
        if key not in _keys(section):
            raise UsageFault(_unknown(keys[: depth + 1]))


def _unknown(keys: Sequence[str | int]) -> str:
    dotted = ".".join(map(str, keys))
    names = _dotted_names()
    moved = [name for name in names if name.rsplit(".", 1)[-1] == str(keys[-1])]
    return f"unknown recipe key {dotted!r}{_nearest(dotted, moved or names, always=True)}"


def _nearest(word: str, names: Iterable[str], *, always: bool = False) -> str:
    found = difflib.get_close_matches(word, list(names), n=1, cutoff=0.0 if always else 0.6)
    return f"; did you mean {found[0]!r}?" if found else ""


def _describe(error: Any) -> str:
    keys = error["loc"]
    dotted = ".".join(map(str, keys))
    if error["type"] == "extra_forbidden":
        return _unknown(keys)
    if error["type"] == "missing":
        return f"key {dotted!r} is missing"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{dotted}: {message}" if dotted else message
    return f"{dotted}: {message[0].lower()}{message[1:]}; found {error['input']!r}"
