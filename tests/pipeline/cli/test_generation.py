"""The options of generation on the command line: every one of them reaches the loop, none changes what is not given."""

from dataclasses import asdict, fields, replace

import click
import pytest
from click.testing import CliRunner

from pipeline.cli.generation import OPTIONS, POLICY_NAMES, chosen, described, generation_options, said
from pipeline.errors import UsageFault
from pipeline.runner import GenerateOptions, Settings
from pipeline.runner.policies import POLICIES
from tests.pipeline.random_models import tiny

OTHER = GenerateOptions(
    gen_length=20, block_length=4, policy="quota", exact=True, monitor=True, vicinity=(1, 2), stop=("x",), edit=0.5
)
SETTINGS = Settings.of_model(tiny(shifted=False).config, generation=OTHER)
GIVEN = {
    "gen_length": (["--gen-length", "9"], 9),
    "block_length": (["--block-length", "3"], 3),
    "steps": (["--steps", "7"], 7),
    "policy": (["--policy", "threshold"], "threshold"),
    "threshold": (["--threshold", "0.25"], 0.25),
    "factor": (["--factor", "2"], 2.0),
    "entropy_bound": (["--entropy-bound", "0"], 0.0),
    "temperature": (["--temperature", "0.5"], 0.5),
    "top_p": (["--top-p", "0.5"], 0.5),
    "seed": (["--seed", "4"], 4),
    "repetition_penalty": (["--repetition-penalty", "1.5"], 1.5),
    "eos": (["--eos", "last"], "last"),
    "eos_threshold": (["--eos-threshold", "0.5"], 0.5),
    "edit": (["--edit", "0.75"], 0.75),
    "exact": (["--exact"], True),
    "refresh_every": (["--refresh-every", "2"], 2),
    "vicinity": (["--vicinity", "3", "4"], (3, 4)),
    "guidance": (["--guidance", "0.5"], 0.5),
    "stop": (["--stop", "a", "--stop", "b"], ("a", "b")),
    "monitor": (["--monitor"], True),
}


def parse(words, settings=SETTINGS):
    """The options that a command gets from these words."""
    found = []

    @click.command()
    @generation_options
    def command(**given):
        found.append(chosen(settings, given))

    result = CliRunner().invoke(command, words, standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return found[0]


def test_every_option_has_a_word():
    assert set(GIVEN) == {field.name for field in fields(GenerateOptions)}


@pytest.mark.parametrize("name", GIVEN)
def test_one_option_changes_one_thing(name):
    words, value = GIVEN[name]
    bare = replace(SETTINGS, generation=GenerateOptions())
    assert parse(words, bare) == replace(GenerateOptions(), **{name: value})
    assert parse(words) == replace(OTHER, **{name: value})


def test_what_is_not_given_is_the_bundles():
    assert parse([]) == OTHER


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--gen-length", "auto"], {"gen_length": None}),
        (["--steps", "auto"], {"steps": None}),
        (["--edit", "off"], {"edit": None}),
        (["--stop", ""], {"stop": ()}),
        (["--no-exact"], {"exact": False}),
        (["--no-monitor"], {"monitor": False}),
    ],
    ids=lambda words: " ".join(words) if isinstance(words, list) else "",
)
def test_what_the_bundle_turns_on_can_be_turned_off(words, expected):
    on = replace(SETTINGS, generation=replace(OTHER, steps=None if "gen_length" in expected else 5))
    assert parse(words, on) == replace(on.generation, **expected) != on.generation


def test_help_says_the_defaults():
    shown = {name: option(lambda: None).__click_params__[-1].help for name, option in OPTIONS.items()}
    usual = {name: said(name, value) or "none" for name, value in asdict(GenerateOptions()).items()}
    assert {name: text.partition("[bundle's, or ")[2].rstrip("].") for name, text in shown.items()} == usual


@pytest.mark.parametrize(
    "words",
    [
        ["--gen-length", "0"],
        ["--gen-length", "long"],
        ["--block-length", "0"],
        ["--steps", "0"],
        ["--steps", "off"],
        ["--edit", "auto"],
    ],
)
def test_what_is_no_number_is_refused(words):
    with pytest.raises(click.UsageError) as caught:
        parse(words)
    assert words[0] in caught.value.format_message()


@pytest.mark.parametrize(
    "words", [["--threshold", "1.5"], ["--threshold", "-0.1"], ["--policy", "best"], ["--stop", "a", "--stop", ""]]
)
def test_what_cannot_be_meant_is_refused(words):
    with pytest.raises(UsageFault):
        parse(words)


def test_help_names_every_policy():
    assert POLICY_NAMES.split(", ") == list(POLICIES)


def test_what_was_chosen_is_said():
    usual = (
        "gen-length 32, block-length 32, policy threshold, threshold 0.9, temperature 0.0, exact no, refresh-every 1"
    )
    assert described(GenerateOptions()) == usual
    assert described(GenerateOptions(gen_length=None)).startswith("gen-length auto, ")
    assert described(replace(GenerateOptions(), stop=("a", "b"), vicinity=(1, 2), edit=0.5)) == (
        usual.replace("exact", "edit 0.5, exact") + ", vicinity 1 2, stop a b"
    )
