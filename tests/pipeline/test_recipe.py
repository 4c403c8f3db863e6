"""Recipes: what is accepted comes back unchanged; what is not is refused with a name."""

import re
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from passes.methods import METHODS
from passes.options import Options
from pipeline.errors import InputRefused, UsageFault
from pipeline.models.config import ModelConfig
from pipeline.recipe import LINEAR_FORMATS, Recipe, linear_names
from pipeline.recipe_file import (
    BUILTIN_RECIPES,
    MAX_BYTES,
    apply_setting,
    dump_recipe,
    load_recipe,
    parse_recipe,
    parse_yaml,
    read_resolved,
)
from pipeline.runner.policies import POLICIES
from pipeline.runner.settings import EOS_MODES, GenerateOptions

CONFIG = ModelConfig(
    family="llada",
    hidden_size=128,
    intermediate_size=384,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    head_dim=32,
    embedding_size=384,
    vocab_size=380,
    max_length=256,
    rope_theta=1e4,
    norm_eps=1e-5,
    qkv_bias=False,
    tied_head=False,
    shifted_logits=False,
    mask_id=379,
    eos_id=378,
    pad_id=378,
)


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    w_bits, a_bits = draw(st.sampled_from(sorted(LINEAR_FORMATS)))
    group = draw(st.sampled_from([0, 16, 128]))
    head = draw(st.sampled_from([16, 8]))
    return Recipe.model_validate(
        {
            "name": draw(st.from_regex(r"[a-z0-9][a-z0-9._-]{0,20}", fullmatch=True)),
            "description": draw(st.text(max_size=40)),
            "method": "none" if w_bits == 16 and head == 16 else "rtn",
            "linear": {
                "w_bits": w_bits,
                "a_bits": a_bits,
                "w_group": group if w_bits < 16 else 0,
                "symmetric": draw(st.booleans()) if a_bits < 16 else True,
            },
            "head": {"bits": head},
            "skip": draw(st.lists(st.text(max_size=10), max_size=3)) if w_bits < 16 else [],
            "validation": {"max_nll_increase": draw(st.floats(0, 1e3)), "min_argmax_agreement": draw(st.floats(0, 1))},
            "lowering": {"guidance": True},
            "generation": draw(generations()),
        }
    )


@st.composite
def generations(draw: st.DrawFn) -> dict[str, Any]:
    gen_length = draw(st.none() | st.integers(1, 4096))
    count, share = st.integers(0, 99), st.floats(0.0625, 1)
    return {
        "gen_length": gen_length,
        "block_length": draw(st.integers(1, gen_length or 4096)),
        "steps": None if gen_length is None else draw(st.none() | st.integers(1, 64)),
        "policy": draw(st.sampled_from(sorted(POLICIES))),
        "eos": draw(st.sampled_from(EOS_MODES)),
        "edit": draw(st.none() | share),
        "vicinity": draw(st.lists(count, min_size=2, max_size=2)),
        "stop": draw(st.lists(st.text(min_size=1, max_size=3), max_size=2)),
        **{name: draw(share) for name in ("threshold", "top_p", "eos_threshold", "factor", "repetition_penalty")},
        **{name: draw(st.just(0.0) | share) for name in ("temperature", "guidance", "entropy_bound")},
        **{name: draw(st.booleans()) for name in ("exact", "monitor")},
        "seed": draw(count),
        "refresh_every": draw(st.integers(1, 9)),
    }


@given(recipes())
def test_a_resolved_recipe_reads_back_equal(recipe: Recipe) -> None:
    text = dump_recipe(recipe)
    assert parse_recipe(text, "it") == recipe
    assert dump_recipe(parse_recipe(text, "it")) == text


def test_a_resolved_recipe_names_every_default(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(load_recipe("rtn-w4a4")), encoding="utf-8")
    assert read_resolved(path) == load_recipe("rtn-w4a4")
    assert set(parse_yaml(path.read_text(encoding="utf-8"), "it")) == set(Recipe.model_fields)
    path.write_text("name: [", encoding="utf-8")
    with pytest.raises(InputRefused, match=r"recipe\.yaml"):
        read_resolved(path)


def leaves(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if not isinstance(value, dict):
        return [(prefix, value)]
    return [leaf for key, inner in value.items() for leaf in leaves(inner, f"{prefix}.{key}".lstrip("."))]


@given(recipes())
def test_a_recipe_can_be_rebuilt_by_settings_alone(recipe: Recipe) -> None:
    data: dict[str, Any] = {}
    for dotted, value in leaves(recipe.model_dump(mode="json")):
        apply_setting(data, f"{dotted}={dump_value(value)}")
    assert Recipe.model_validate(data) == recipe


def dump_value(value: Any) -> str:
    import yaml

    return yaml.safe_dump(value, default_flow_style=True, allow_unicode=False, width=10**6).removesuffix("\n...\n")


def test_settings_win_over_the_file_and_take_hyphens() -> None:
    recipe = load_recipe("rtn-w4a16", ["linear.w-group=64", "generation.threshold=5e-1", "generation.steps=null"])
    assert recipe.linear.w_group == 64
    assert recipe.generation.threshold == 0.5
    assert recipe.generation.steps is None
    assert recipe.linear.w_bits == 4


KEYS = [name for name, _ in leaves(Recipe.model_validate({"name": "x", "method": "none"}).model_dump(mode="json"))]


@given(st.sampled_from(KEYS), st.data())
def test_a_key_with_one_letter_wrong_is_answered_with_the_right_one(key: str, data: st.DataObject) -> None:
    last = key.rsplit(".", 1)[-1]
    place = data.draw(st.integers(key.rindex(last), len(key) - 1))
    wrong = key[:place] + "q" + key[place + 1 :]
    with pytest.raises(UsageFault, match="unknown recipe key") as refused:
        load_recipe("rtn-w4a4", [f"{wrong}=1"])
    suggested = str(refused.value).split("did you mean ")[1].strip("'?")
    # k_bits and v_bits are equally near to q_bits.
    assert suggested in KEYS
    assert [a == b for a, b in zip(suggested, wrong, strict=True)].count(False) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("linear: {w_bit: 4}", "unknown recipe key 'linear.w_bit'; did you mean 'linear.w_bits'?"),
        ("w_bits: 4", "unknown recipe key 'w_bits'; did you mean 'linear.w_bits'?"),
        ("seed: 1", "unknown recipe key 'seed'; did you mean 'validation.seed'?"),
        ("lineer: {}", "unknown recipe key 'lineer'; did you mean 'linear'?"),
        ("linear: {w_bits: '4'}", "linear.w_bits: input should be 16, 8, 4 or 3; found '4'"),
        ("linear: {w_bits: true}", "linear.w_bits: input should be 16, 8, 4 or 3; found True"),
        ("linear: {symmetric: 1}", "linear.symmetric: input should be a valid boolean; found 1"),
        ("linear: {w_group: 24, w_bits: 4}", "linear.w_group: input should be a multiple of 16; found 24"),
        ("linear: {w_bits: 3, a_bits: 4}", "w_bits 3 with a_bits 4 is not supported; supported: w16a16"),
        ("linear: {w_group: 128}", "w_group needs w_bits below 16"),
        ("linear: {w_bits: 4, a_group: 16}", "a_group and symmetric: false need a_bits below 16"),
        ("linear: {w_bits: 4, a_bits: 4, w_group: 16, a_group: 32}", "w_group 16 and a_group 32 must be equal"),
        ("head: {bits: 8}\nmethod: none", "method none quantises nothing, but head.bits is below 16"),
        ("method: rtn", "method rtn has nothing to quantise"),
        ("method: none\nskip: [a]", "skip names linears to keep at 16 bits, but linear.w_bits is 16"),
        ("generation: {gen_length: 8}", "block_length 32 is longer than gen_length 8"),
        ("lowering: {opset: 23}", "opset 23 cannot write a cache in place; use cache: window"),
        ("generation: {threshold: 0}", "generation: threshold is 0; expected more than 0 and at most 1"),
        ("generation: {threshold: '1'}", "generation: threshold is '1'; expected a number"),
        ("generation: {vicinity: [1]}", "generation: vicinity is [1]; expected a list of two whole numbers"),
        ("generation: {polcy: quota}", "generation: unknown key 'polcy'; did you mean 'policy'?"),
        ("generation: {policy: qota}", "generation: unknown policy 'qota'; known: quota"),
        ("generation: {steps: 4, gen_length: null}", "generation: steps is 4 without a gen_length"),
        ("generation: {guidance: 1}", "generation.guidance 1 needs a graph for it, and lowering.guidance is false"),
        ("generation: 3", "generation: found 3; expected an object"),
        ("validation: {max_nll_increase: .nan}", "validation.max_nll_increase: input should be a finite number"),
        ("method: magic", "or 'star'; found 'magic'"),
        ("name: ../../etc", "name: string should match pattern"),
        ("schema_version: 2", "schema_version: input should be 1; found 2"),
        ("[1, 2]", "must be a mapping of keys to values; found list"),
        ("", "must be a mapping of keys to values; found NoneType"),
        ("threads: 1\nthreads: 2", "key 'threads' appears twice"),
        ("linear: {w_bits: 4, w_bits: 4}", "key 'w_bits' appears twice"),
        ("1: 2", "key 1 is not text"),
        ("description: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("a: &x [1]\nb: *x", "aliases are not allowed"),
        ("a: [", "is not valid YAML"),
        ("a: " + "[" * 30000, "is not valid YAML"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(text: str, message: str) -> None:
    base = "".join(f"{key}: none\n" for key in ("name", "method") if key not in text and text not in ("", "[1, 2]"))
    with pytest.raises(UsageFault, match=re.escape(message)):
        parse_recipe(base + text, "recipe")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("linear.w_bits", "is not of the form part.field=value"),
        ("=4", "is not of the form part.field=value"),
        ("linear..w_bits=4", "is not of the form part.field=value"),
        ("name.first=4", "recipe key 'name' is a value, it has no 'first' inside"),
        ("linear.w_bits=[", "the value of --set linear.w_bits is not valid YAML"),
        ("linear.w_bits=", "linear.w_bits: input should be 16, 8, 4 or 3; found None"),
    ],
)
def test_bad_settings_are_refused(setting: str, message: str) -> None:
    with pytest.raises(UsageFault, match=re.escape(message)):
        load_recipe("rtn-w4a4", [setting])


@given(st.text(max_size=60))
def test_any_text_is_a_recipe_or_a_usage_fault(text: str) -> None:
    try:
        parse_recipe(text, "it")
    except UsageFault as fault:
        assert "it" in str(fault)


@given(st.text(max_size=40))
def test_any_setting_is_applied_or_a_usage_fault(setting: str) -> None:
    try:
        load_recipe("rtn-w4a4", [setting])
    except UsageFault as fault:
        assert str(fault)


def test_a_recipe_is_found_by_name_or_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\nmethod: none\n", encoding="utf-8")
    assert load_recipe(str(path)).name == "mine"
    with pytest.raises(UsageFault, match="neither a built-in name nor a file; did you mean 'rtn-w4a4'"):
        load_recipe("rtn-w4a44")
    with pytest.raises(UsageFault, match="neither a built-in name nor a file"):
        load_recipe("a\0b")
    with pytest.raises(UsageFault, match="neither a built-in name nor a file"):
        load_recipe(str(tmp_path))
    path.write_bytes(b"name: \xff")
    with pytest.raises(UsageFault, match="cannot be read"):
        load_recipe(str(path))
    path.write_bytes(b"#" * (MAX_BYTES + 1))
    with pytest.raises(UsageFault, match=f"more than {MAX_BYTES} bytes"):
        load_recipe(str(path))


@pytest.mark.parametrize("name", BUILTIN_RECIPES)
def test_built_in_recipes_fit_the_reference_models(name: str) -> None:
    recipe = load_recipe(name)
    recipe.check_exportable()
    recipe.check_against(CONFIG)


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["linear.w_group=48"], "linear.w_group 48 does not divide the model's hidden_size 128"),
        (["linear.w_group=256"], "linear.w_group 256 does not divide the model's hidden_size 128"),
        (["lowering.top_k=384"], "lowering.top_k 384 exceeds the vocabulary of 380"),
        (["generation.gen_length=257"], "generation.gen_length 257 exceeds the model's maximum length of 256"),
        (
            ["generation.gen_length=null", "generation.block_length=257"],
            "generation.block_length 257 exceeds the model's maximum length of 256 tokens; pass --set",
        ),
        (["skip=[blocks.2.*]"], "skip pattern 'blocks.2.*' matches no linear"),
    ],
)
def test_what_does_not_fit_a_model_is_refused(sets: list[str], message: str) -> None:
    with pytest.raises(UsageFault, match=re.escape(message)):
        load_recipe("rtn-w4a4", sets).check_against(CONFIG)


def test_rounded_probabilities_are_not_exported_keys_and_values_are() -> None:
    load_recipe("rtn-w4a4", ["attention.k_bits=8", "attention.v_bits=4"]).check_exportable()
    with pytest.raises(UsageFault, match=r"attention\.prob_bits 8 cannot be exported"):
        load_recipe("rtn-w4a4", ["attention.prob_bits=8"]).check_exportable()


def test_skip_patterns_name_linears() -> None:
    recipe = load_recipe("rtn-w4a4", ["skip=[blocks.0.*, '*.down_proj']"])
    recipe.check_against(CONFIG)
    kept = [name for name in linear_names(CONFIG) if recipe.skips(name)]
    assert kept == [name for name in linear_names(CONFIG) if name.startswith("blocks.0.")] + ["blocks.1.mlp.down_proj"]


@given(generations())
def test_a_recipe_says_all_that_the_runner_may_be_told(generation: dict[str, Any]) -> None:
    assert set(generation) == {field.name for field in fields(GenerateOptions)}
    data = {"name": "x", "method": "none", "lowering": {"guidance": True}}
    assert Recipe.model_validate(data).generation == GenerateOptions()
    lists = {name: tuple(value) for name, value in generation.items() if isinstance(value, list)}
    assert Recipe.model_validate(data | {"generation": generation}).generation == GenerateOptions(**generation | lists)


def test_sections_of_methods_are_the_options_that_passes_read() -> None:
    """The same fields with the same defaults, and what is set arrives."""
    recipe = load_recipe("rtn-w4a4")
    assert recipe.options() == Options()
    for field in fields(Options):
        section = getattr(recipe, field.name)
        assert section.model_dump() == asdict(getattr(Options(), field.name))
    changed = load_recipe("rtn-w4a4", ["gptq.damping=0.5", "duquant.block=64", "freeact.share=16"]).options()
    assert (changed.gptq.damping, changed.duquant.block, changed.freeact.share) == (0.5, 64, 16)


def test_blocks_of_duquant_are_small_enough_to_be_multiplied_many_times() -> None:
    assert load_recipe("duquant-w4a4", ["duquant.block=1024"]).options().duquant.block == 1024
    with pytest.raises(UsageFault, match=r"duquant\.block"):
        load_recipe("duquant-w4a4", ["duquant.block=1025"])


def test_methods_are_those_of_the_table() -> None:
    assert set(get_args(Recipe.model_fields["method"].annotation)) == set(METHODS)
