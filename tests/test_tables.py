"""Every model family, method, op, backend, policy, recipe and command stands in its table, under its own name."""

import importlib
import pkgutil
import re
from pathlib import Path
from types import ModuleType

import click
import pytest

import passes.methods
import pipeline.backends
import pipeline.cli
import pipeline.folder
import pipeline.models
import pipeline.runner.policies
import plugins
from pipeline.recipe_file import BUILTIN_FOLDER, BUILTIN_RECIPES, load_recipe
from pipeline.version import VERSION

ROOT = Path(__file__).parents[1]


def modules_of(package: ModuleType, *, but: set[str] = frozenset()) -> set[str]:
    """Names of a package's modules, less those that hold no entry of its table."""
    found = {module.name for module in pkgutil.iter_modules(package.__path__)}
    assert but <= found, f"{sorted(but - found)} are gone from {package.__name__}: remove them here"
    return found - but


def test_every_method_is_in_its_table() -> None:
    assert set(passes.methods.METHODS) == modules_of(passes.methods, but={"method"})


def test_every_policy_is_in_its_table() -> None:
    assert set(pipeline.runner.policies.POLICIES) == modules_of(pipeline.runner.policies)


def test_every_backend_is_in_its_table() -> None:
    infrastructure = {"backend", "guided", "ort_cache", "precheck", "score", "wire"}
    assert set(pipeline.backends.BACKENDS) == modules_of(pipeline.backends, but=infrastructure)


def test_every_family_is_in_its_table() -> None:
    infrastructure = {"checkpoint", "config", "family", "fields", "json_file", "links"}
    infrastructure |= {"shards", "tokenizer", "transformer"}
    assert set(pipeline.models.FAMILIES) == modules_of(pipeline.models, but=infrastructure)
    assert all(family.name == name for name, family in pipeline.models.FAMILIES.items())


def test_every_op_is_in_its_table() -> None:
    infrastructure = {"affine_grid", "body", "cuda_library", "functions", "int4", "integer_linear", "integer_matmul"}
    infrastructure |= {"cuda_census", "cuda_launches", "layout", "op", "toolchain"}
    assert set(plugins.OPS) == modules_of(plugins, but=infrastructure)


def test_every_recipe_is_in_its_table() -> None:
    assert {path.stem for path in BUILTIN_FOLDER.glob("*.yaml")} == set(BUILTIN_RECIPES)
    assert len(list(BUILTIN_FOLDER.iterdir())) == len(BUILTIN_RECIPES)


@pytest.mark.parametrize("name", BUILTIN_RECIPES)
def test_recipes_carry_their_file_name_and_a_known_method(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description
    assert recipe.method in passes.methods.METHODS
    assert recipe.generation.policy in pipeline.runner.policies.POLICIES


def test_every_command_is_in_its_table() -> None:
    files = modules_of(pipeline.cli, but={"generation"})
    assert {entry.module.rsplit(".", 1)[-1] for entry in pipeline.cli.COMMANDS.values()} == files


@pytest.mark.parametrize("name", pipeline.cli.COMMANDS)
def test_commands_are_what_the_help_says(name: str) -> None:
    entry = pipeline.cli.COMMANDS[name]
    command = getattr(importlib.import_module(entry.module), entry.attribute)
    assert isinstance(command, click.Command)
    assert str(command.help).startswith(entry.summary.removesuffix("."))


def test_stages_are_commands_in_their_order() -> None:
    stages = importlib.import_module("pipeline.stages")
    assert tuple(stages.STAGES) == pipeline.folder.STAGES
    named = [name for name in pipeline.cli.COMMANDS if name in pipeline.folder.STAGES]
    assert tuple(named) == pipeline.folder.STAGES


def test_version_is_the_distribution_s() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r'^version = "(.*)"$', text, re.MULTILINE)
    assert found
    assert found.group(1) == VERSION
