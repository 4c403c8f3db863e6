"""The grid: which cells there are, and that each has the recipe of its method with the bits of the study."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from passes.methods import METHODS
from pipeline.errors import UsageFault
from pipeline.quantize import check_format
from pipeline.recipe_file import BUILTIN_FORMATS, load_recipe
from pipeline.study.grid import BITS, DECIDED, FULL, QUANTISING, Cell, Grid, Variant, known, parse_seeds, short_name

CELL = Cell(model="m", method="rtn", bits="w4a4")
BUILTIN = [(method, bits) for method, formats in BUILTIN_FORMATS.items() for bits in formats]


def grid(**changes: object) -> Grid:
    settings: dict[str, object] = {
        "methods": ("rtn", "gptq"),
        "bits": ("w4a16", "w4a4"),
        "seeds": dict.fromkeys(BITS, 1),
    }
    return Grid(**settings | changes)


def test_cells_vary_by_what_the_method_reads() -> None:
    cells = list(grid(states=("noised", "clean"), seeds={"w4a16": 1, "w4a4": 2}).cells("m"))
    found = [(cell.method, cell.bits, cell.states, cell.seed) for cell in cells]
    assert found == [
        (FULL, "float32", "", 0),
        ("rtn", "w4a16", "", 0),
        ("gptq", "w4a16", "noised", 0),
        ("gptq", "w4a16", "clean", 0),
        ("rtn", "w4a4", "", 0),
        ("gptq", "w4a4", "noised", 0),
        ("gptq", "w4a4", "noised", 1),
        ("gptq", "w4a4", "clean", 0),
        ("gptq", "w4a4", "clean", 1),
    ]
    assert len(set(cells)) == len(cells)


@pytest.mark.parametrize(("method", "bits"), BUILTIN)
def test_a_built_in_recipe_is_the_cell_s(method: str, bits: str) -> None:
    """So that `dllmc export --recipe NAME` gives the model that the study measured."""
    cell = Cell(model="m", method=method, bits=bits, states="noised", seed=0)
    expected = load_recipe(f"{method}-{bits}", ["threads=1", "calibration.states=noised", "calibration.seed=0"])
    assert grid().recipe(cell) == expected


@pytest.mark.parametrize("method", QUANTISING)
@pytest.mark.parametrize("bits", BITS)
def test_every_cell_has_the_bits_of_the_study_or_says_why_not(method: str, bits: str) -> None:
    states = "noised" if method in ("freeact", "star") else "clean"
    recipe = grid(threads=3).recipe(Cell(model="m", method=method, bits=bits, states=states, seed=7))
    assert {name: getattr(recipe.linear, name) for name in BITS[bits]} == BITS[bits]
    assert (recipe.method, recipe.threads, recipe.head.bits) == (method, 3, 8)
    assert (recipe.calibration.states, recipe.calibration.seed) == (states, 7)
    if (BITS[bits]["w_bits"], BITS[bits]["a_bits"]) in METHODS[method].formats:
        check_format(recipe)
    else:
        with pytest.raises(UsageFault, match=f"{method} cannot do"):
            check_format(recipe)


def test_a_format_without_a_recipe_takes_its_method_s_other_settings() -> None:
    """DuQuant's activations are asymmetric whatever their groups."""
    cell = Cell(model="m", method="duquant", bits="w4a4g128", states="noised")
    recipe = grid().recipe(cell)
    assert not recipe.linear.symmetric
    assert recipe.linear.a_group == 128


VARIANTS = {
    "whole": Variant(recipe="flatquant-w4a4"),
    "hasty": Variant(recipe="flatquant-w4a4", sets=("flatquant.epochs=1", "attention.v_bits=4")),
    "plain": Variant(recipe="rtn-w8a8"),
}


def test_variants_are_cells_of_their_recipe_s_method_and_bits() -> None:
    whole = Grid(variants=VARIANTS, seeds={"w4a4": 2}, sets=("calibration.samples=5",), threads=2)
    whole.check()
    cells = list(whole.cells("m"))
    assert [(cell.method, cell.bits, cell.seed, cell.variant) for cell in cells] == [
        (FULL, "float32", 0, ""),
        ("flatquant", "w4a4", 0, "whole"),
        ("flatquant", "w4a4", 1, "whole"),
        ("flatquant", "w4a4", 0, "hasty"),
        ("flatquant", "w4a4", 1, "hasty"),
        ("rtn", "w8a8", 0, "plain"),
    ]
    sets = ["threads=2", "calibration.samples=5", "calibration.states=noised", "calibration.seed=1"]
    hasty = load_recipe("flatquant-w4a4", [*sets, "flatquant.epochs=1", "attention.v_bits=4"])
    assert whole.recipe(cells[4]) == hasty
    assert whole.recipe(cells[2]) == load_recipe("flatquant-w4a4", sets)
    assert cells[4].label == "m flatquant w4a4 noised seed 1 hasty"


def test_variants_stand_behind_the_methods() -> None:
    cells = list(grid(methods=("rtn",), bits=("w4a4",), variants=VARIANTS, seeds={"w4a4": 1}).cells("m"))
    assert [cell.variant for cell in cells] == ["", "", "whole", "hasty", "plain"]
    assert len(set(cells)) == len(cells)


def test_settings_reach_every_recipe() -> None:
    recipe = grid(sets=("calibration.samples=5", "attention.v_bits=8")).recipe(CELL)
    assert (recipe.calibration.samples, recipe.attention.v_bits) == (5, 8)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"methods": ("gtpq",)}, "did you mean gptq"),
        ({"methods": ("none",)}, "--methods takes rtn"),
        ({"methods": ()}, "--methods is empty"),
        ({"methods": ("rtn", "rtn")}, "names rtn twice"),
        ({"bits": ("w4a5",)}, "unknown format 'w4a5'"),
        ({"states": ("noisy",)}, "did you mean noised"),
        ({"sets": ("gptq.dampening=1",)}, "gptq.damping"),
        ({"variants": {"a": Variant(recipe="flatqant-w4a4")}}, "did you mean flatquant-w4a4"),
        ({"variants": {"a": Variant(recipe="fp16")}}, "unknown format 'fp16'"),
        ({"variants": {"a": Variant(recipe="rtn-w4a4", sets=("threads=2",))}}, "pass --threads instead"),
        ({"variants": VARIANTS, "methods": ()}, "--methods is empty"),
        *[({"sets": (f"{key}=1",)}, f"pass {option} instead") for key, option in DECIDED.items()],
    ],
)
def test_what_cannot_be_meant_is_refused(changes: dict[str, object], why: str) -> None:
    with pytest.raises(UsageFault) as fault:
        grid(**changes).check()
    assert why in str(fault.value)


def test_known_names_pass() -> None:
    grid(states=("clean", "noised"), sets=("gptq.damping=0.02",)).check()
    known(["a"], ["a", "b"], "letter", "--letters")


@given(st.integers(1, 1000), st.dictionaries(st.sampled_from(list(BITS)), st.integers(1, 1000)))
def test_seeds_are_one_number_and_others_for_some_bits(all_bits: int, some: dict[str, int]) -> None:
    words = [str(all_bits), *(f"{bits}={count}" for bits, count in some.items())]
    assert parse_seeds(",".join(words), list(BITS)) == dict.fromkeys(BITS, all_bits) | some
    assert parse_seeds(words[-1], list(BITS))[next(reversed(some), "w4a4")] == int(words[-1].rpartition("=")[2])


@pytest.mark.parametrize("text", ["", "0", "-1", "x", "1.5", "w4a4", "w4a4=", "w9a9=2", "1,,2", "1001", "³"])
def test_what_is_no_number_of_seeds_is_refused(text: str) -> None:
    with pytest.raises(UsageFault, match="--seeds"):
        parse_seeds(text, ["w4a4"])


def test_seeds_of_bits_stand_before_or_after_those_of_all() -> None:
    assert parse_seeds("w4a4=3,2", ["w8a8", "w4a4"]) == {"w8a8": 2, "w4a4": 3}


def test_seeds_of_bits_that_were_not_asked_for_name_them() -> None:
    with pytest.raises(UsageFault, match=r"names 'w4a16', which is not among --bits w4a4$"):
        parse_seeds("1,w4a16=2", ["w4a4"])


def test_no_bits_at_all_are_told_as_such() -> None:
    with pytest.raises(UsageFault, match="not a number of seeds"):
        parse_seeds("x", [])
    with pytest.raises(UsageFault, match="--bits is empty"):
        grid(bits=(), seeds=parse_seeds("1", [])).check()


@pytest.mark.parametrize("model", ["builtin:tiny", "models/tiny", "/models/tiny/", "tiny"])
def test_models_have_short_names(model: str) -> None:
    assert short_name(model) == "tiny"
    assert (
        Cell(model=model, method="gptq", bits="w4a4", states="noised", seed=2).label == "tiny gptq w4a4 noised seed 2"
    )
