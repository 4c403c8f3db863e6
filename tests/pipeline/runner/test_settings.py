"""config.json of a bundle, there and back, and everything that can be wrong with it."""

import json
from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import InputRefused, UsageFault
from pipeline.runner import GenerateOptions, Settings, read_settings
from tests.pipeline.random_models import tiny

GOOD = Settings.of_model(tiny(shifted=True).config, generation=GenerateOptions(steps=7)).as_json()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "config.json"


def test_what_is_written_is_read(path):
    settings = Settings.of_model(tiny(shifted=True).config, top_k=5, generation=GenerateOptions(gen_length=9, steps=3))
    path.write_text(json.dumps(settings.as_json()))
    assert read_settings(path) == settings
    assert settings.shifted_logits
    assert settings.embedding_size == 40


def test_generation_has_defaults(path):
    path.write_text(json.dumps({**GOOD, "generation": {"gen_length": 5}}))
    assert read_settings(path).generation == GenerateOptions(gen_length=5)


def test_lists_come_back_as_they_were(path):
    chosen = GenerateOptions(
        gen_length=None, vicinity=(16, 8), stop=("\n\n", "Question:"), edit=0.5, eos="last", exact=True
    )
    settings = Settings.of_model(tiny(shifted=False).config, generation=chosen)
    path.write_text(json.dumps(settings.as_json()))
    assert read_settings(path).generation == chosen


def test_a_config_of_before_there_was_a_cache_is_read(path):
    old = {"gen_length": 9, "block_length": 3, "steps": None, "policy": "quota", "threshold": 0.5}
    old |= {"temperature": 0.0, "seed": 0}
    path.write_text(json.dumps({**GOOD, "generation": old}))
    assert read_settings(path).generation == GenerateOptions(
        gen_length=9, block_length=3, policy="quota", threshold=0.5
    )


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"gen_length": 0}, "gen_length is 0"),
        ({"block_length": 0}, "block_length is 0"),
        ({"block_length": -1}, "block_length is -1"),
        ({"steps": 0}, "steps is 0"),
        ({"steps": 4, "gen_length": None}, "without a gen_length"),
        ({"refresh_every": 0}, "refresh_every is 0"),
        ({"policy": "treshold"}, "did you mean threshold"),
        ({"eos": "always"}, "none, forbid, last, threshold"),
        ({"threshold": 0.0}, "threshold is 0.0"),
        ({"threshold": 1.5}, "threshold is 1.5"),
        ({"threshold": float("nan")}, "threshold is nan"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"eos_threshold": 2.0}, "eos_threshold is 2.0"),
        ({"edit": 0.0}, "edit is 0.0"),
        ({"factor": 0.0}, "factor is 0.0"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty is inf"),
        ({"entropy_bound": -0.1}, "entropy_bound is -0.1"),
        ({"guidance": float("nan")}, "guidance is nan"),
        ({"vicinity": (0, -1)}, "vicinity is"),
        ({"stop": ("a", "")}, "empty text"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": 1e-9}, "temperature is 1e-09"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_options_that_cannot_be_meant_are_usage_faults(options, why):
    GenerateOptions().check()
    with pytest.raises(UsageFault, match=why):
        GenerateOptions(**options).check()


WRONG = {
    "no object": [],
    "no version": {key: value for key, value in GOOD.items() if key != "dllmc_config"},
    "other version": {**GOOD, "dllmc_config": 2},
    "unknown key": {**GOOD, "maskid": 3},
    "missing key": {key: value for key, value in GOOD.items() if key != "mask_id"},
    "text for a number": {**GOOD, "mask_id": "37"},
    "bool for a number": {**GOOD, "mask_id": True},
    "number for a bool": {**GOOD, "shifted_logits": 1},
    "id out of range": {**GOOD, "mask_id": 40},
    "negative id": {**GOOD, "pad_id": -1},
    "mask that ends the text": {**GOOD, "mask_id": 36},
    "vocabulary too large": {**GOOD, "vocab_size": 41},
    "no length": {**GOOD, "max_length": 0},
    "generation is no object": {**GOOD, "generation": 3},
    "generation with an unknown key": {**GOOD, "generation": {"tau": 0.9}},
    "generation with a wrong type": {**GOOD, "generation": {"steps": 1.5}},
    "generation that cannot be meant": {**GOOD, "generation": {"threshold": 0}},
    "generation with a number for a list": {**GOOD, "generation": {"vicinity": 3}},
    "generation with too short a list": {**GOOD, "generation": {"vicinity": [3]}},
    "generation with a list of bools": {**GOOD, "generation": {"vicinity": [True, False]}},
    "generation with a text for a list": {**GOOD, "generation": {"stop": "ab"}},
    "generation with an unknown policy": {**GOOD, "generation": {"policy": "best"}},
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_content_is_refused(path, case):
    path.write_text(json.dumps(WRONG[case]))
    with pytest.raises(InputRefused, match=r"config\.json"):
        read_settings(path)


def test_absent_or_no_json_is_refused(path):
    with pytest.raises(InputRefused, match="missing"):
        read_settings(path)
    for content in (b"", b"{", b"\xff\xfe", b"[" * 100_000):
        path.write_bytes(content)
        with pytest.raises(InputRefused, match="cannot be read as JSON"):
            read_settings(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3), st.lists, max_leaves=3
)


@given(st.sampled_from([field.name for field in fields(GenerateOptions)]), JSON)
def test_any_value_of_any_option_is_read_or_refused(tmp_path_factory, key, value):
    path = tmp_path_factory.mktemp("settings") / "config.json"
    path.write_text(json.dumps({**GOOD, "generation": {key: value}}))
    try:
        hash(read_settings(path).generation)
    except InputRefused as fault:
        assert "config.json" in str(fault)


@given(st.sampled_from(sorted(GOOD)), JSON)
def test_any_value_of_any_key_is_read_or_refused(tmp_path_factory, key, value):
    path = tmp_path_factory.mktemp("settings") / "config.json"
    path.write_text(json.dumps({**GOOD, key: value}))
    try:
        read_settings(path)
    except InputRefused as fault:
        assert "config.json" in str(fault)
