"""Weight layouts: every byte where the kernels' head comment says, permutations only, the same linear from each."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from plugins.int4 import pack_int4
from plugins.layout import LAYOUTS, from_layout, to_layout

FRAGMENT = 1


def draw(outputs: int, inner: int, limit: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(outputs * inner)
    return torch.randint(-limit, limit + 1, (outputs, inner), generator=generator, dtype=torch.int8)


def test_fragment_order_is_the_documented_one() -> None:
    outputs, columns = 32, 128
    weight = torch.arange(outputs * columns, dtype=torch.int32).reshape(outputs, columns)
    stored = to_layout(weight, FRAGMENT).flatten().tolist()
    for place, value in enumerate(stored):
        tile, within = divmod(place, 1024)
        step, within = divmod(within, 512)
        lane, within = divmod(within, 16)
        register, byte = divmod(within, 4)
        r, t = divmod(lane, 4)
        output = 16 * (tile // (columns // 64)) + 2 * r + register % 2
        column = 64 * (tile % (columns // 64)) + 16 * t + 8 * step + 4 * (register // 2) + byte
        assert value == output * columns + column


@given(st.integers(1, 3), st.integers(1, 3), st.sampled_from(LAYOUTS), st.sampled_from((1, 2)))
def test_layouts_are_permutations(rows: int, columns: int, layout: int, codes_per_byte: int) -> None:
    weight = torch.arange(rows * 16 * columns * 64 * codes_per_byte).reshape(rows * 16, -1)
    stored = to_layout(weight, layout, codes_per_byte)
    assert stored.shape == weight.shape
    assert torch.equal(from_layout(stored, layout, codes_per_byte), weight)


def test_codes_that_share_a_byte_stay_together() -> None:
    weight = draw(16, 256, 7)
    assert torch.equal(pack_int4(to_layout(weight, FRAGMENT, 2)), to_layout(pack_int4(weight), FRAGMENT))


@pytest.mark.parametrize("w_group", [0, 128], ids=["channel", "group"])
@pytest.mark.parametrize("name", ["int4_linear", "int8_linear"])
def test_a_linear_is_the_same_from_every_layout(name: str, w_group: int, both: Any) -> None:
    w_bits = int(name[3])
    weight = draw(32, 256, 7 if w_bits == 4 else 127)
    rng = np.random.default_rng(0)
    inputs = {
        "codes": rng.integers(-7, 8, (5, 256)).astype(np.int8),
        "scale": rng.uniform(0.01, 1, (5, 1)).astype(np.float32),
        "weight": weight.numpy(),
        "w_scale": rng.uniform(0.01, 1, (32, 256 // w_group if w_group else 1)).astype(np.float32),
    }
    attributes = {"a_bits": 4 if w_bits == 4 else 8, "w_bits": w_bits, "a_group": 0, "w_group": w_group}
    canonical, _ = both(name, {**attributes, "layout": 0}, inputs)
    stored = to_layout(weight, FRAGMENT, 8 // w_bits).numpy()
    reference, body = both(name, {**attributes, "layout": FRAGMENT}, {**inputs, "weight": stored})
    assert not np.array_equal(stored, weight.numpy())
    assert np.array_equal(reference["y"], canonical["y"])
    assert np.array_equal(body["y"], canonical["y"])


def test_the_head_is_the_same_from_every_layout(both: Any) -> None:
    weight = draw(48, 128, 127)
    rng = np.random.default_rng(0)
    inputs = {
        "codes": rng.integers(-127, 128, (1, 3, 128)).astype(np.int8),
        "scale": rng.uniform(0.001, 0.01, (1, 3, 1)).astype(np.float32),
        "weight": weight.numpy(),
        "w_scale": rng.uniform(0.001, 0.01, (48, 1)).astype(np.float32),
        "logit_bias": np.zeros(48, np.float32),
        "inv_temp": np.ones(1, np.float32),
    }
    canonical, _ = both("head", {"top_k": 4, "layout": 0}, inputs)
    stored = to_layout(weight, FRAGMENT).numpy()
    reference, body = both("head", {"top_k": 4, "layout": FRAGMENT}, {**inputs, "weight": stored})
    for name in canonical:
        assert np.array_equal(reference[name], canonical[name])
    assert np.array_equal(body["top_ids"], canonical["top_ids"])
    assert np.array_equal(body["top_logits"], canonical["top_logits"])


@pytest.mark.parametrize(("shape", "layout"), [((24, 64), 1), ((16, 96), 1), ((16, 64), 2)])
def test_what_does_not_fit_is_named(shape: tuple[int, int], layout: int) -> None:
    with pytest.raises(ValueError, match=r"got (\[|2)"):
        to_layout(torch.zeros(shape), layout)
