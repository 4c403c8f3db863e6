"""Published configs become ModelConfigs; what we do not implement is refused by name when it is switched on."""

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import InputRefused
from pipeline.models import BUILTIN, FAMILIES, family_of, resolve
from pipeline.models.config import ModelConfig
from tests.pipeline.models.folders import DREAM_CONFIG, LLADA_CONFIG, PUBLISHED, make_config

SWITCHED_ON = [
    ("llada", "activation_type", "gelu"),
    ("llada", "activation_type", "swiglu"),
    ("llada", "alibi", True),
    ("llada", "attention_layer_norm", True),
    ("llada", "bias_for_layer_norm", True),
    ("llada", "block_group_size", 2),
    ("llada", "block_type", "sequential"),
    ("llada", "clip_qkv", 8.0),
    ("llada", "embedding_layer_norm", True),
    ("llada", "include_bias", True),
    ("llada", "input_emb_norm", True),
    ("llada", "layer_norm_type", "default"),
    ("llada", "layer_norm_with_affine", False),
    ("llada", "norm_after", True),
    ("llada", "quantization_config", {"bits": 4}),
    ("llada", "rope", False),
    ("llada", "rope_scaling", {"rope_type": "yarn", "factor": 4.0}),
    ("llada", "scale_logits", True),
    ("dream", "hidden_act", "gelu"),
    ("dream", "attention_bias", False),
    ("dream", "layer_types", ["full_attention", "sliding_attention"]),
    ("dream", "mlp_bias", True),
    ("dream", "partial_rotary_factor", 0.5),
    ("dream", "quantization_config", {"bits": 4}),
    ("dream", "rope_parameters", {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5}),
    ("dream", "rope_parameters", {"rope_type": "yarn", "rope_theta": 1e6}),
    ("dream", "rope_scaling", {"type": "linear", "factor": 2.0}),
    ("dream", "use_mrope", True),
    ("dream", "use_qk_norm", True),
    ("dream", "use_sliding_window", True),
]
REQUIRED = {
    "llada": [
        "d_model",
        "n_heads",
        "n_layers",
        "vocab_size",
        "max_sequence_length",
        "rope_theta",
        "rms_norm_eps",
        "weight_tying",
        "mask_token_id",
        "eos_token_id",
    ],
    "dream": [
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
        "max_position_embeddings",
        "rope_theta",
        "rms_norm_eps",
        "tie_word_embeddings",
        "mask_token_id",
        "eos_token_id",
    ],
}
WRONG = [
    ("llada", "n_heads", 5),
    ("llada", "n_kv_heads", 3),
    ("llada", "n_heads", 32),  # one channel a head has no second half to turn
    ("llada", "d_model", "32"),
    ("llada", "d_model", 0),
    ("llada", "d_model", 10**12),
    ("llada", "n_layers", 10**9),
    ("llada", "n_layers", True),
    ("llada", "rope_theta", float("inf")),
    ("llada", "rope_theta", float("nan")),
    ("llada", "rms_norm_eps", -1e-5),
    ("llada", "weight_tying", "false"),
    ("llada", "embedding_size", 64),
    ("llada", "mask_token_id", 128),
    ("llada", "eos_token_id", [80, 81]),
    ("llada", "eos_token_id", None),
    ("dream", "mask_token_id", -1),
    ("dream", "pad_token_id", 96),
    ("dream", "head_dim", 7),
    ("dream", "num_key_value_heads", 3),
    ("dream", "layer_types", "full_attention"),
    ("dream", "rope_parameters", "default"),
]


def read(family: str, values: dict[str, Any]) -> ModelConfig:
    return FAMILIES[family].read_config(values)


@pytest.mark.parametrize("family", FAMILIES)
def test_published_config_is_read(family: str) -> None:
    assert read(family, PUBLISHED[family]) == make_config(family)


@pytest.mark.parametrize("family", FAMILIES)
def test_written_config_has_the_published_keys(family: str) -> None:
    written = FAMILIES[family].write_config(make_config(family))
    assert PUBLISHED[family].keys() - written.keys() <= {"auto_map", "_name_or_path"}
    assert written.items() <= PUBLISHED[family].items()


@given(
    family=st.sampled_from(list(FAMILIES)),
    heads=st.integers(1, 8),
    half=st.integers(1, 16),
    groups=st.integers(1, 8),
    layers=st.integers(1, 5),
    tied=st.booleans(),
    spare=st.integers(0, 40),
)
def test_config_survives_a_round_trip(
    family: str, heads: int, half: int, groups: int, layers: int, tied: bool, spare: int
) -> None:
    config = make_config(
        family,
        num_heads=heads * groups,
        num_kv_heads=heads,
        head_dim=2 * half,
        hidden_size=heads * groups * 2 * half,
        num_layers=layers,
        tied_head=tied,
        qkv_bias=family == "dream" or tied,
        embedding_size=96 + (spare if family == "llada" else 0),
    )
    assert read(family, FAMILIES[family].write_config(config)) == config


@pytest.mark.parametrize(("family", "key", "value"), SWITCHED_ON)
def test_a_feature_that_is_on_is_refused_by_name(family: str, key: str, value: object) -> None:
    with pytest.raises(InputRefused, match=rf"config.json: {key} is {re.escape(repr(value))}"):
        read(family, PUBLISHED[family] | {key: value})


@pytest.mark.parametrize(("family", "key"), sorted({(family, key) for family, key, _ in SWITCHED_ON}))
def test_a_feature_that_is_off_is_accepted(family: str, key: str) -> None:
    assert read(family, PUBLISHED[family] | {key: None}) == make_config(family)
    absent = {k: v for k, v in PUBLISHED[family].items() if k != key}
    assert read(family, absent) == make_config(family)


@pytest.mark.parametrize(("family", "key"), [(f, key) for f, keys in REQUIRED.items() for key in keys])
def test_a_required_key_has_no_default(family: str, key: str) -> None:
    with pytest.raises(InputRefused, match=f"config.json: {key} is missing"):
        read(family, {k: v for k, v in PUBLISHED[family].items() if k != key})


@pytest.mark.parametrize(("family", "key", "value"), WRONG)
def test_a_wrong_value_is_refused_by_name(family: str, key: str, value: object) -> None:
    with pytest.raises(InputRefused, match=rf"config.json: {key} is .*expected"):
        read(family, PUBLISHED[family] | {key: value})


@given(
    family=st.sampled_from(list(FAMILIES)),
    data=st.data(),
    value=st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.integers()) | st.just({}),
)
def test_any_value_is_read_or_refused(family: str, data: st.DataObject, value: object) -> None:
    key = data.draw(st.sampled_from(sorted(PUBLISHED[family])))
    try:
        config = read(family, PUBLISHED[family] | {key: value})
    except InputRefused as refusal:
        assert "config.json: " in str(refusal)
    else:
        assert config.num_heads * config.head_dim == config.hidden_size


def test_sizes_that_llada_derives() -> None:
    assert read("llada", LLADA_CONFIG | {"n_kv_heads": None}).num_kv_heads == 4
    assert read("llada", LLADA_CONFIG | {"n_kv_heads": None, "multi_query_attention": True}).num_kv_heads == 1
    assert read("llada", LLADA_CONFIG | {"n_kv_heads": 2, "multi_query_attention": False}).num_kv_heads == 2
    assert read("llada", LLADA_CONFIG | {"mlp_hidden_size": None}).intermediate_size == 4 * 32
    assert read("llada", LLADA_CONFIG | {"embedding_size": None}).embedding_size == 96
    with pytest.raises(InputRefused, match="n_kv_heads is 2, expected 1 or null, because multi_query_attention"):
        read("llada", LLADA_CONFIG | {"n_kv_heads": 2, "multi_query_attention": True})
    with pytest.raises(InputRefused, match=r"mlp_ratio is 0\.3"):
        read("llada", LLADA_CONFIG | {"mlp_hidden_size": None, "mlp_ratio": 0.3})
    with pytest.raises(InputRefused, match="mlp_hidden_size is missing"):
        read("llada", {k: v for k, v in LLADA_CONFIG.items() if not k.startswith("mlp_")})


def test_keys_that_newer_transformers_write() -> None:
    """transformers 5 puts rope_theta inside rope_parameters and lists each layer's attention."""
    values = {key: value for key, value in DREAM_CONFIG.items() if key not in ("rope_theta", "rope_scaling")}
    values["layer_types"] = ["full_attention"] * 2
    inner = {"rope_type": "default", "rope_theta": 1e6}
    assert read("dream", values | {"rope_parameters": inner}) == make_config("dream")
    assert read("dream", values | {"rope_parameters": inner, "rope_theta": 1e6}) == make_config("dream")
    with pytest.raises(InputRefused, match=r"rope_theta is 10000\.0, expected one value"):
        read("dream", values | {"rope_parameters": inner, "rope_theta": 1e4})
    with pytest.raises(InputRefused, match="rope_theta is missing"):
        read("dream", values | {"rope_parameters": {"rope_type": "default"}})


def test_padding_id_falls_back_on_eos() -> None:
    values = {key: value for key, value in DREAM_CONFIG.items() if key != "pad_token_id"}
    assert read("dream", values).pad_id == 80
    assert read("dream", values | {"pad_token_id": None}).pad_id == 80


@pytest.mark.parametrize("family", FAMILIES)
def test_tensor_names_are_distinct_and_a_tied_head_has_none(family: str) -> None:
    names = FAMILIES[family].tensor_names(make_config(family))
    assert len(set(names.values())) == len(names)
    tied = FAMILIES[family].tensor_names(make_config(family, tied_head=True))
    assert names.keys() - tied.keys() == {"head.weight"}


def test_model_types_are_spelled_exactly() -> None:
    assert [family_of(kind) for kind in ("llada", "Dream")] == list(FAMILIES.values())
    assert family_of("dream") is None


def test_resolve_names_what_there_is(tmp_path: Any) -> None:
    assert resolve(str(tmp_path)) == tmp_path
    assert resolve("builtin:tiny-llada") == BUILTIN["tiny-llada"]
    with pytest.raises(InputRefused, match="did you mean builtin:tiny-dream"):
        resolve("builtin:tiny-dreem")
    with pytest.raises(InputRefused, match="found nothing, expected a folder"):
        resolve(str(tmp_path / "absent"))
    (tmp_path / "file").write_text("")
    with pytest.raises(InputRefused, match="found a file, expected a folder"):
        resolve(str(tmp_path / "file"))
    for name in ("~nobody_of_this_name/x", "a" * 300):
        with pytest.raises(InputRefused, match="cannot be opened"):
            resolve(name)
