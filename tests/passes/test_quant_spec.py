"""Which linear gets which spec."""

import dataclasses

import pytest

from passes.quant_spec import QuantPlan, QuantSpec

LINEAR, HEAD = QuantSpec(w_bits=4, a_bits=4), QuantSpec(w_bits=8, a_bits=8)


@pytest.mark.parametrize(
    ("site", "skip", "expected"),
    [
        ("blocks.0.attn.o_proj", (), LINEAR),
        ("head", (), HEAD),
        ("blocks.0.head", (), LINEAR),  # only the LM head is called just that
        ("blocks.0.mlp.down_proj", ("*.down_proj",), None),
        ("blocks.1.mlp.down_proj", ("blocks.0.*",), LINEAR),
        ("blocks.10.mlp.down_proj", ("blocks.1.*",), LINEAR),
        ("blocks.7.attn.q_k_v_proj", ("nothing", "blocks.[0-7].attn.*"), None),
        ("head", ("head",), HEAD),  # the head has its own bits in the recipe
        ("blocks.0.attn.o_proj", ("attn",), LINEAR),  # a pattern covers the whole name
        ("head", ("*",), HEAD),
    ],
)
def test_spec_of_a_site(site: str, skip: tuple[str, ...], expected: QuantSpec | None) -> None:
    assert QuantPlan(linear=LINEAR, head=HEAD, skip=skip).spec(site) is expected


def test_no_plan_is_no_spec() -> None:
    plan = QuantPlan(linear=None, head=None)
    assert plan.spec("head") is None
    assert plan.spec("blocks.0.mlp.down_proj") is None
    assert plan.embedding_bits == 16


def test_float_activations_are_the_default() -> None:
    assert dataclasses.asdict(QuantSpec(w_bits=4)) == {
        "w_bits": 4,
        "a_bits": 16,
        "w_group": 0,
        "a_group": 0,
        "symmetric": True,
        "w_symmetric": True,
    }


def test_specs_are_values() -> None:
    assert QuantSpec(w_bits=4) == QuantSpec(w_bits=4)
    assert len({QuantSpec(w_bits=4), QuantSpec(w_bits=4), QuantSpec(w_bits=8)}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        LINEAR.w_bits = 8  # type: ignore[misc]
