"""Transforms of mask states: AdamW as a textbook writes it on each linear's own error, gates in the forward pass."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from passes.fit import Batch, CalibrationError, Fit
from passes.gate_transforms import gate_masks, gate_of, gated_factors
from passes.graph import attributes
from passes.insert_transform import Transform
from passes.learned_orthogonal import LearnedOrthogonal, hadamard_factors, random_factors
from passes.learned_transforms import Site
from passes.options import Options, Star
from passes.quant_spec import QuantPlan, QuantSpec
from passes.solvers.draws import generator
from passes.train_state_transforms import TrainStateTransforms, squared_errors, train
from tests.passes.adamw import textbook_adamw
from tests.passes.rewrites import on_shapes
from tests.passes.samples import Listed
from tests.passes.sketch import HALVES, Sketch, aten

SPEC = QuantSpec(w_bits=4, a_bits=4)
STAR = Star(share=6, epochs=3, batch=2)
NAMES = ("mlp.gate_up_proj", "mlp.down_proj")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed, str(shape)))


def plan_of(star: Star, *, skip: tuple[str, ...] = ()) -> QuantPlan:
    return QuantPlan(linear=SPEC, head=SPEC, skip=skip, options=Options(star=star))


def block(*, width: int = 12, inner: int = 8) -> GraphModule:
    """Gate and up with a bias, SwiGLU, down, residual."""
    sketch = Sketch()
    x = sketch.input("x")
    sketch.input("state")
    merged = sketch.linear(x, NAMES[0], drawn(2 * inner, width), drawn(2 * inner))
    gate, up = (sketch(aten.slice.Tensor, merged, *half) for half in HALVES)
    joined = sketch(aten.mul.Tensor, sketch(aten.silu.default, gate), up)
    return sketch.output(sketch(aten.add.Tensor, x, sketch.linear(joined, NAMES[1], drawn(width, inner))))


def samples(*sizes: int, width: int = 12, length: int = 6, seed: int = 0) -> Listed:
    """As many samples in each batch, the same however they are cut; states differ, the last row of each is padding."""
    count = sum(sizes)
    masked = (torch.arange(length) % 2 == 1).expand(count, length)
    x = drawn(count, length, 3, seed=seed) @ drawn(3, width, seed=seed) + 2 * masked[..., None] * drawn(width)
    valid = torch.ones(count, length, dtype=torch.bool)
    valid[:, -1] = False
    made, first = [], 0
    for size in sizes:
        part = slice(first, first + size)
        inputs = (x[part], masked[part].int())
        made.append(Batch(inputs=inputs, valid=valid[part], masked=masked[part], noise=torch.zeros(size), first=first))
        first += size
    return Listed(made)


def trained(graph: GraphModule, data: Listed, star: Star = STAR, *, seed: int = 0) -> dict[str, Transform]:
    found = TrainStateTransforms(plan_of(star), Fit(samples=data, seed=seed))
    assert found(graph) == len(found.transforms) == 2
    return found.transforms


def total_errors(graph: GraphModule, data: Listed, star: Star, transforms: dict[str, Transform]) -> dict[str, float]:
    sites = TrainStateTransforms(plan_of(star), Fit()).sites(graph)
    starts = {name: (each.left, each.right) for name, each in transforms.items()}
    learned = LearnedOrthogonal(sites, starts, clips=False)
    with torch.no_grad():
        parts = [squared_errors(graph, learned, batch) for batch in data]
    return {name: sum(float(part[name]) for part in parts) for name in sites}


@pytest.mark.parametrize(
    ("init", "transform", "left"),
    [("random", "kronecker", 0.7), ("random", "dense", 0.3), ("moments", "kronecker", 0.9)],
)
def test_the_error_of_each_linear_falls(init: str, transform: str, left: float) -> None:
    graph, data = block(), samples(4, 4)
    before = {name: value.clone() for name, value in attributes(graph).items()}
    star = Star(share=6, epochs=0, batch=4, rate=5e-3, init=init, transform=transform)  # type: ignore[arg-type]
    start = total_errors(graph, data, star, trained(graph, data, star))
    found = trained(graph, data, replace(star, epochs=40))
    for name, error in total_errors(graph, data, star, found).items():
        assert error <= left * start[name], name
    for each in found.values():
        for factor in (each.left, each.right):
            assert (factor.T @ factor - torch.eye(len(factor))).abs().max() <= 1e-5
    assert all(torch.equal(value, before[name]) for name, value in attributes(graph).items())
    assert not any(value.requires_grad for value in attributes(graph).values())


def textbook(weight: Tensor, data: Listed, star: Star, *, steps: int) -> dict[str, Tensor]:
    """One linear of 6 channels in tiles of 2 x 3: P and gates dense, a loss for each state, autograd, one cosine."""

    def grid(rows: Tensor, ratio: Tensor) -> Tensor:
        step = rows.abs().amax(-1, keepdim=True) * ratio / 7
        codes = rows / step
        return (codes + (codes.round() - codes).detach()).clamp(-7, 7) * step

    def orthogonal(free: Tensor, start: Tensor) -> Tensor:
        skew = free.tril(-1) - free.tril(-1).T
        one = torch.eye(len(free))
        return start @ torch.linalg.inv(one + skew) @ (one - skew)

    keeps = {
        False: torch.diag(torch.tensor([1.0, 0, 1, 1, 0, 1])),
        True: torch.diag(torch.tensor([1.0, 1, 0, 1, 1, 0])),
    }
    starts = [factor.float() for factor in random_factors((2, 3), 0, "a.o_proj")]
    free = {"left": torch.zeros(2, 2), "right": torch.zeros(3, 3)}
    if star.clip_rate:
        free |= {"clip": torch.tensor(4.0), "w_clip": torch.full((len(weight), 1), 4.0)}
    states: dict[str, dict[str, Tensor]] = {name: {} for name in free}

    def ratio(name: str) -> Tensor:
        return torch.sigmoid(free[name]) if name in free else torch.tensor(1.0)

    batches = list(data)
    for step in range(1, steps + 1):
        batch = batches[(step - 1) % len(batches)]
        for value in free.values():
            value.requires_grad_()
        dense = torch.kron(orthogonal(free["left"], starts[0]), orthogonal(free["right"], starts[1]))
        error = torch.zeros(())
        for state, keep in keeps.items():
            x = batch.inputs[0][batch.valid & (batch.masked == state)]
            gated = grid(x @ dense @ keep, ratio("clip"))
            error = error + (gated @ grid(weight @ dense, ratio("w_clip")).T - x @ weight.T).square().sum()
        gradients = torch.autograd.grad(error / error.detach(), list(free.values()))
        cosine = (1 + math.cos(math.pi * (step - 1) / steps)) / 2
        for (name, value), gradient in zip(list(free.items()), gradients, strict=True):
            free[name] = value.detach()
            own = star.rate * (star.clip_rate if "clip" in name else 1)
            textbook_adamw(
                free[name], gradient, states[name], star.rate * 1e-3 + (own - star.rate * 1e-3) * cosine, step
            )
    found = {
        side: orthogonal(free[side].detach(), start) for side, start in zip(("left", "right"), starts, strict=True)
    }
    return found | {name: ratio(name).detach() for name in ("clip", "w_clip")}


@pytest.mark.parametrize("clip_rate", [0.0, 10.0])
def test_steps_are_those_of_the_textbook(clip_rate: float) -> None:
    sketch = Sketch()
    x = sketch.input("x")
    sketch.input("state")
    weight = drawn(3, 6)
    graph = sketch.output(sketch.linear(x, "a.o_proj", weight))
    data, star = samples(2, 2, width=6), Star(share=3, epochs=4, batch=2, rate=5e-3, clip_rate=clip_rate)
    gates = gate_masks((2, 3), gate_of((2, 3), 3))
    one = Site(weight=weight, bias=None, spec=SPEC, factors=(2, 3), gates=gates)
    starts = {"a.o_proj": random_factors((2, 3), 0, "a.o_proj")}
    learned = LearnedOrthogonal({"a.o_proj": one}, starts, clips=clip_rate > 0)
    found = train(graph, learned, data, options=star)["a.o_proj"]
    expected = textbook(weight, data, star, steps=8)
    for value, name in zip(found.factors, ("left", "right"), strict=True):
        assert (value - expected[name]).abs().max() <= 1e-4  # eight steps of 5e-3 each, equal in float32
        assert (value - starts["a.o_proj"][name == "right"]).abs().max() >= 1e-3
    assert (found.clip_hi - expected["clip"]).abs() <= 1e-4
    assert (found.w_clip - expected["w_clip"]).abs().max() <= 1e-4


def test_no_linear_s_transform_depends_on_another_s() -> None:
    graph, data = block(), samples(4)
    both = trained(graph, data)
    alone = TrainStateTransforms(plan_of(STAR, skip=(NAMES[0],)), Fit(samples=data))
    assert alone(graph) == 1
    # Cayley's map solves factors of one size together, and alone in other lanes.
    assert (alone.transforms[NAMES[1]].left - both[NAMES[1]].left).abs().max() <= 1e-5
    assert (alone.transforms[NAMES[1]].right - both[NAMES[1]].right).abs().max() <= 1e-5


def test_how_samples_are_cut_does_not_matter_and_the_seed_does() -> None:
    graph, star = block(), replace(STAR, batch=4)
    expected = trained(graph, samples(4, 2), star)
    for sizes in ((6,), (1, 1, 1, 1, 1, 1), (3, 3)):
        found = trained(graph, samples(*sizes), star)
        for name, each in expected.items():
            assert (found[name].left - each.left).abs().max() <= 1e-5  # six steps of 1e-3, sums in another order
            assert (found[name].right - each.right).abs().max() <= 1e-5
    again, other = (trained(graph, samples(4, 2), star, seed=seed) for seed in (0, 1))
    assert all(torch.equal(again[name].right, each.right) for name, each in expected.items())
    assert not any(torch.equal(other[name].right, each.right) for name, each in expected.items())


@pytest.mark.parametrize("init", ["random", "moments"])
def test_padding_is_not_learned_from(init: str) -> None:
    graph, data, star = block(), samples(2), replace(STAR, init=init)  # type: ignore[arg-type]
    expected = trained(graph, data, star)
    data.batches[0].inputs[0][:, -1] = 1e4
    found = trained(graph, data, star)
    assert all(torch.equal(found[name].right, each.right) for name, each in expected.items())


def test_moments_start_where_the_other_state_has_least() -> None:
    """States in channels of their own, half each: a gate along one axis of the tile takes nothing from the other."""
    sketch = Sketch()
    x = sketch.input("x")
    sketch.input("state")
    graph = sketch.output(sketch.linear(x, "a.o_proj", drawn(5, 32)))
    data = samples(4, width=32)
    tile = drawn(4, 6, 4, 8).abs() + 1
    tile[:, ::2, :, :4] = 0  # unmasked
    tile[:, 1::2, :, 4:] = 0
    batch = replace(data.batches[0], inputs=(tile.flatten(-2), data.batches[0].inputs[1]))
    star = Star(share=8, init="moments", epochs=0)
    plan = replace(plan_of(star), linear=replace(SPEC, w_bits=8, a_bits=8))
    pass_ = TrainStateTransforms(plan, Fit(samples=Listed([batch])))
    sites = pass_.sites(graph)
    assert sites["a.o_proj"].factors == (4, 8)
    values = LearnedOrthogonal(sites, pass_.starts(graph, sites, Listed([batch]), {}), clips=False).values()
    left, right = values["a.o_proj"].factors
    turned = left.T @ tile @ right
    gates = sites["a.o_proj"].gates
    assert gates is not None
    cut = turned * (1 - gates[batch.masked.long()])
    assert cut[batch.valid].square().sum() <= 1e-10 * turned.square().sum()


def test_a_hadamard_is_not_learned() -> None:
    graph = block()
    found = TrainStateTransforms(plan_of(replace(STAR, transform="hadamard")), Fit(seed=3))
    assert found(graph) == 2
    for name, width in zip(NAMES, (12, 8), strict=True):
        left, right = hadamard_factors(gated_factors(width, 6), 3, name)
        assert torch.equal(found.transforms[name].left, left)
        assert torch.equal(found.transforms[name].right, right)


@pytest.mark.parametrize("clip_rate", [0.0, 10.0])
def test_clips_are_kept_for_the_passes_after_where_they_learn(clip_rate: float) -> None:
    graph, fit = block(), Fit(samples=samples(2))
    found = TrainStateTransforms(plan_of(replace(STAR, clip_rate=clip_rate), skip=("*.down_proj",)), fit)
    before = str(graph.graph)
    assert found(graph) == 1
    assert str(graph.graph) == before
    assert set(found.transforms) == {NAMES[0]}
    assert set(fit.numbers) == ({f"{NAMES[0]}.clip_lo", f"{NAMES[0]}.clip_hi"} if clip_rate else set())
    assert all(0 < ratio < 1 for ratio in fit.numbers.values())
    assert {name: value.shape for name, value in fit.tensors.items()} == (
        {f"{NAMES[0]}.w_clip": (16, 1)} if clip_rate else {}
    )


@pytest.mark.parametrize("transform", ["kronecker", "dense", "hadamard"])
def test_shapes_alone_give_shapes_alone(transform: str) -> None:
    graph, star = block(), replace(STAR, transform=transform, epochs=1)  # type: ignore[arg-type]
    real, shapes = (TrainStateTransforms(plan_of(star), fit) for fit in (Fit(samples=samples(2)), Fit()))
    assert real(graph) == shapes(on_shapes(graph)) == 2

    def sizes(found: TrainStateTransforms) -> dict[str, tuple[torch.Size, torch.Size]]:
        return {name: (each.left.shape, each.right.shape) for name, each in found.transforms.items()}

    assert sizes(real) == sizes(shapes)
    assert all(each.left.is_meta and each.right.is_meta for each in shapes.transforms.values())


def test_nothing_to_learn_and_nothing_to_learn_from() -> None:
    assert TrainStateTransforms(replace(plan_of(STAR), linear=None), Fit())(block()) == 0
    with pytest.raises(ValueError, match="there are no samples"):
        TrainStateTransforms(plan_of(STAR), Fit())(block())


@pytest.mark.parametrize(("kept", "missing"), [(True, "unmasked"), (False, "masked")])
def test_samples_that_lack_a_state_are_refused(kept: bool, missing: str) -> None:
    data = samples(2)
    batch = data.batches[0]
    one_state = replace(batch, valid=batch.valid & (batch.masked == kept))
    with pytest.raises(CalibrationError, match=rf"calibration rows at mlp\.gate_up_proj is {missing};.*states=noised"):
        TrainStateTransforms(plan_of(STAR), Fit(samples=Listed([one_state])))(block())


def test_a_tile_without_room_for_gates_names_the_option() -> None:
    with pytest.raises(CalibrationError, match=r"no room for two gates of 1/2; try a larger star\.share"):
        TrainStateTransforms(plan_of(replace(STAR, share=2)), Fit(samples=samples(2)))(block())


def test_an_error_that_is_not_finite_names_its_site_and_samples() -> None:
    data = samples(2, 2)
    data.batches[1].inputs[0][1, 0] = torch.inf
    with pytest.raises(
        CalibrationError, match=r"of mlp\.gate_up_proj in calibration samples 2 to 3 is nan.*star\.rate"
    ):
        TrainStateTransforms(plan_of(STAR), Fit(samples=data))(block())
    with pytest.raises(CalibrationError, match=r"the input of mlp\.gate_up_proj has values that are not finite"):
        TrainStateTransforms(plan_of(replace(STAR, init="moments")), Fit(samples=data))(block())


def test_what_the_last_step_breaks_is_refused() -> None:
    graph = block()
    sites = TrainStateTransforms(plan_of(STAR), Fit()).sites(graph)
    starts = {name: random_factors(site.factors, 0, name) for name, site in sites.items()}
    starts[NAMES[1]][0][0, 0] = torch.nan
    with pytest.raises(CalibrationError, match=r"learned for mlp\.down_proj is not finite.*star\.rate"):
        train(graph, LearnedOrthogonal(sites, starts, clips=False), samples(2), options=replace(STAR, epochs=0))
