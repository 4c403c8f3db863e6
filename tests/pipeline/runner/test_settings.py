"""config.json of a bundle, there and back, and everything that can be wrong with it."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import InputRefused
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


@given(st.sampled_from(sorted(GOOD)), JSON)
def test_any_value_of_any_key_is_read_or_refused(tmp_path_factory, key, value):
    path = tmp_path_factory.mktemp("settings") / "config.json"
    path.write_text(json.dumps({**GOOD, key: value}))
    try:
        read_settings(path)
    except InputRefused as fault:
        assert "config.json" in str(fault)
