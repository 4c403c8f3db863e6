"""Learned block rotations: nothing changes but how large the largest inputs are."""

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from passes import insert_rotation
from passes.fit import CalibrationError, Fit
from passes.graph import attributes
from passes.insert_rotation import BlockRotation, InsertRotation
from passes.magnitudes import largest_rows
from passes.quant_spec import QuantPlan, QuantSpec
from passes.solvers.draws import generator
from tests.passes.live_bytes import peak_bytes
from tests.passes.samples import listed
from tests.passes.sketch import Sketch, assert_untouched, copy_of, count, edited, ops

WIDTHS = {"a.o_proj": 24, "a.down_proj": 45}
PLAN = QuantPlan(linear=QuantSpec(w_bits=4, a_bits=4), head=None)


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator(0, str(shape)))


def two_linears() -> GraphModule:
    sketch = Sketch()
    inputs = [sketch.input(site.rpartition(".")[2]) for site in WIDTHS]
    made = [sketch.linear(x, site, drawn(6, width)) for x, (site, width) in zip(inputs, WIDTHS.items(), strict=True)]
    return sketch.output(*made)


def spiky_inputs() -> tuple[Tensor, ...]:
    """A large channel in each, and one huge row in the padding."""
    inputs = tuple(drawn(3, 8, width) for width in WIDTHS.values())
    for x in inputs:
        x[..., 5] *= 40
        x[:, -1] *= 1e4
    return inputs


def inserting(plan: QuantPlan = PLAN, *, block: int = 10, steps: int = 12, seed: int = 0) -> InsertRotation:
    fit = Fit(samples=listed(spiky_inputs(), spiky_inputs(), padding=1), seed=seed)
    return InsertRotation(plan, fit, block=block, steps=steps)


def test_turning_a_large_weight_takes_one_copy_of_it() -> None:
    turn = BlockRotation(drawn(4, 16, 16), torch.arange(64).flip(0))
    weight = drawn(200_000, 64)
    assert peak_bytes(lambda: turn.apply(weight)) <= 1.2 * weight.nbytes
    assert torch.equal(turn.apply(weight[:9]), ops.rotate(weight[:9], turn.blocks, turn.order))


def test_nothing_changes_and_the_maximum_falls() -> None:
    graph = two_linears()
    made, counts = edited(graph, inserting())
    assert counts == [2]
    assert count(made, ops.rotate.default) == 4
    weights, inputs = attributes(made), spiky_inputs()
    assert weights["a.o_proj.rotation_1.blocks"].shape == (3, 8, 8)  # 8 is the largest divisor of 24 up to 10
    assert weights["a.down_proj.rotation_2.blocks"].shape == (5, 9, 9)
    for found, expected in zip(made(*inputs), graph(*inputs), strict=True):
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    for x, site in zip(inputs, WIDTHS, strict=True):
        names = [f"{site}.rotation_{n}" for n in (1, 2)]
        y = x[:, :-1]
        for name in names:
            y = ops.rotate(y, weights[f"{name}.blocks"], weights[f"{name}.order"])
        assert y.abs().max() <= 0.6 * x[:, :-1].abs().max()
        assert (y.norm(dim=-1) - x[:, :-1].norm(dim=-1)).abs().max() <= 1e-4 * x[:, :-1].norm(dim=-1).max()
        assert sorted(weights[f"{names[1]}.order"].tolist()) == list(range(x.shape[-1]))


def test_the_seed_decides() -> None:
    one, same, other = (attributes(edited(two_linears(), inserting(seed=seed))[0]) for seed in (0, 0, 1))
    assert all(torch.equal(value, same[name]) for name, value in one.items())
    assert not torch.equal(one["a.o_proj.rotation_1.blocks"], other["a.o_proj.rotation_1.blocks"])


def test_float_activations_and_skipped_sites_stay() -> None:
    plan = QuantPlan(linear=QuantSpec(w_bits=4), head=None)
    assert_untouched(two_linears(), inserting(plan))
    plan = QuantPlan(linear=PLAN.linear, head=None, skip=("*.o_proj",))
    made, counts = edited(two_linears(), inserting(plan))
    assert counts == [1]
    assert not any("o_proj.rotation" in name for name in attributes(made))


def test_on_shapes_alone_the_graph_is_the_same() -> None:
    real, _ = edited(two_linears(), inserting())
    shapes = copy_of(two_linears())
    for module in shapes.modules():
        for leaf, value in list(module.named_buffers(recurse=False)):
            module.register_buffer(leaf, value.to("meta"))
    found, _ = edited(shapes, InsertRotation(PLAN, Fit(), block=10, steps=12))
    assert str(found.graph) == str(real.graph)
    described = [{n: (v.shape, v.dtype) for n, v in attributes(graph).items()} for graph in (found, real)]
    assert described[0] == described[1]


def test_weights_without_samples_are_our_own_mistake() -> None:
    with pytest.raises(ValueError, match="there are no samples"):
        InsertRotation(PLAN, Fit(), block=8, steps=1)(two_linears())


def test_inputs_that_are_not_finite_are_named() -> None:
    inputs = spiky_inputs()
    inputs[1][2, 3, 4] = torch.nan
    fit = Fit(samples=listed(spiky_inputs(), inputs))
    with pytest.raises(CalibrationError, match=r"a\.down_proj has .* not finite in .* sample 5;"):
        InsertRotation(PLAN, fit, block=8, steps=1)(two_linears())


def test_no_rotation_raises_the_maximum_of_any_block() -> None:
    """Each is learned on what it gets: the second on the first one's rows in their new order."""
    graph, rotate = two_linears(), inserting(steps=20)
    assert rotate.fit.samples is not None
    rows = largest_rows(graph, rotate.fit.samples, limit=insert_rotation.ROWS)
    weights = attributes(edited(graph, rotate)[0])
    for site, x in rows.items():
        for number in (1, 2):
            blocks, order = (weights[f"{site}.rotation_{number}.{leaf}"] for leaf in ("blocks", "order"))
            y = ops.rotate(x, blocks, order)
            before, after = (part.unflatten(1, (len(blocks), -1)).abs().amax((0, 2)) for part in (x[:, order], y))
            assert bool((after <= before * (1 + 1e-6)).all())
            assert bool((after < 0.99 * before).any())
            x = y
