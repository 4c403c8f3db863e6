"""Learning transforms: AdamW as a textbook writes it, less error, nothing that depends on how samples are cut."""

import math

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from passes.fit import Batch, CalibrationError, Fit
from passes.graph import attributes
from passes.insert_transform import Transform
from passes.learned_transforms import LearnedTransforms, Site, Values
from passes.options import FlatQuant, Options
from passes.quant_spec import QuantPlan, QuantSpec
from passes.solvers.draws import generator
from passes.solvers.hadamard import random_orthogonal
from passes.train_transforms import TrainTransforms, squared_error, train
from tests.passes.adamw import textbook_adamw
from tests.passes.samples import Listed
from tests.passes.sketch import HALVES, Sketch, aten, copy_of

SPEC = QuantSpec(w_bits=4, a_bits=4)
PLAN = QuantPlan(linear=SPEC, head=SPEC)
SHORT = FlatQuant(epochs=3, batch=2)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed, str(shape)))


def block(*, width: int = 12, inner: int = 8) -> GraphModule:
    """Norm, gate and up, SwiGLU, down, residual; some channels are ten times larger than others."""
    sketch = Sketch()
    x = sketch.input("x")
    sketch.input("state")
    gain = sketch.weight("mlp_norm.weight", 10 ** (drawn(width) / 2))
    normed = sketch(aten.rms_norm.default, x, [width], gain, 1e-5)
    merged = sketch.linear(normed, "mlp.gate_up_proj", drawn(2 * inner, width), drawn(2 * inner))
    gate, up = (sketch(aten.slice.Tensor, merged, *half) for half in HALVES)
    joined = sketch(aten.mul.Tensor, sketch(aten.silu.default, gate), up)
    return sketch.output(sketch(aten.add.Tensor, x, sketch.linear(joined, "mlp.down_proj", drawn(width, inner))))


def samples(*sizes: int, width: int = 12, length: int = 5, seed: int = 0) -> Listed:
    """As many samples of rank 3 in each batch, the same however they are cut; the last row of each is padding."""
    x = drawn(sum(sizes), length, 3, seed=seed) @ drawn(3, width, seed=seed)
    masked = drawn(sum(sizes), length, seed=seed + 1) > 0
    valid = torch.ones(len(x), length, dtype=torch.bool)
    valid[:, -1] = False
    made, first = [], 0
    for size in sizes:
        part = slice(first, first + size)
        inputs = (x[part], masked[part].int())
        made.append(Batch(inputs=inputs, valid=valid[part], masked=masked[part], noise=torch.zeros(size), first=first))
        first += size
    return Listed(made)


def sites_of(graph: GraphModule, data: Listed, **keywords: int) -> dict[str, Site]:
    return TrainTransforms(PLAN, Fit(samples=data), **keywords).sites(graph, data)


def total_error(graph: GraphModule, data: Listed, learned: LearnedTransforms, values: dict[str, Values]) -> float:
    learned.values = lambda: values  # type: ignore[method-assign]
    with torch.no_grad():
        return sum(float(squared_error(graph, learned, batch)) for batch in data)


@pytest.mark.parametrize("share", [{}, {"share": 6}])
def test_the_error_of_the_block_falls(share: dict[str, int]) -> None:
    graph, data = block(), samples(4, 4)
    before = {name: value.clone() for name, value in attributes(graph).items()}
    sites = sites_of(graph, data, **share)
    learned = LearnedTransforms(sites, 0)
    with torch.no_grad():
        start = total_error(graph, data, learned, learned.values())
    found = train(graph, sites, data, options=FlatQuant(epochs=30, batch=4), seed=0)
    assert total_error(graph, data, learned, found) <= 0.6 * start
    assert all(torch.equal(value, before[name]) for name, value in attributes(graph).items())
    assert not any(value.requires_grad for value in attributes(graph).values())


def textbook(weight: Tensor, data: Listed, scale: Tensor, *, steps: int, rate: float) -> dict[str, Tensor]:
    """One linear of 4 channels, its transform dense; plain autograd, one cosine, clips ten times faster."""

    def grid(rows: Tensor, ratio: Tensor) -> Tensor:
        step = rows.abs().amax(-1, keepdim=True) * ratio / 7
        codes = rows / step
        return (codes + (codes.round() - codes).detach()).clamp(-7, 7) * step

    def orthogonal(free: Tensor, start: Tensor) -> Tensor:
        skew = free.tril(-1) - free.tril(-1).T
        return start @ torch.linalg.inv(torch.eye(2) + skew) @ (torch.eye(2) - skew)

    starts = {f"{side}.{part}": random_orthogonal(2, generator(0, "a.o_proj", side, part)).float()
              for side in ("left", "right") for part in ("u", "v")}  # fmt: skip
    free = {name: torch.zeros(2, 2) for name in starts}
    free |= {f"{side}.d": torch.zeros(2) for side in ("left", "right")}
    free |= {"scale": scale.log(), "clip": torch.tensor(4.0), "w_clip": torch.full((len(weight), 1), 4.0)}
    states: dict[str, dict[str, Tensor]] = {name: {} for name in free}

    def parts() -> dict[str, Tensor]:
        found = {}
        for side in ("left", "right"):
            u, v = (orthogonal(free[f"{side}.{part}"], starts[f"{side}.{part}"]) for part in ("u", "v"))
            found[side] = u @ torch.diag(free[f"{side}.d"].exp()) @ v.T
        return found

    batches = list(data)
    for step in range(1, steps + 1):
        batch = batches[(step - 1) % len(batches)]
        for value in free.values():
            value.requires_grad_()
        dense = torch.kron(parts()["left"], parts()["right"])
        x = batch.inputs[0][batch.valid]
        inputs = grid(x / free["scale"].exp() @ dense, torch.sigmoid(free["clip"]))
        folded = (weight * free["scale"].exp()) @ torch.linalg.inv(dense).T
        error = (inputs @ grid(folded, torch.sigmoid(free["w_clip"])).T - x @ weight.T).square().sum()
        gradients = torch.autograd.grad(error / error.detach(), list(free.values()))
        cosine = (1 + math.cos(math.pi * (step - 1) / steps)) / 2
        for (name, value), gradient in zip(list(free.items()), gradients, strict=True):
            free[name] = value.detach()
            own = rate * 10 if "clip" in name else rate
            textbook_adamw(free[name], gradient, states[name], rate * 1e-3 + (own - rate * 1e-3) * cosine, step)
    return {name: value.detach() for name, value in {**free, **parts()}.items()}


def test_steps_are_those_of_the_textbook() -> None:
    sketch = Sketch()
    x = sketch.input("x")
    sketch.input("state")
    weight = drawn(3, 4)
    graph = sketch.output(sketch.linear(x, "a.o_proj", weight))
    data, scale = samples(2, 2, width=4), drawn(4).abs() + 0.5
    one = Site(weight=weight, bias=None, spec=SPEC, factors=(2, 2), scale=scale)
    options = FlatQuant(epochs=4, batch=2)
    found = train(graph, {"a.o_proj": one}, data, options=options, seed=0)["a.o_proj"]
    expected = textbook(weight, data, scale, steps=8, rate=options.rate)
    assert found.scale is not None
    for value, name in zip((*found.factors, found.scale.log()), ("left", "right", "scale"), strict=True):
        assert (value - expected[name]).abs().max() <= 1e-4  # eight steps of 5e-3 each, equal in float32
    assert (found.clip_hi - expected["clip"].sigmoid()).abs() <= 1e-4
    assert (found.w_clip - expected["w_clip"].sigmoid()).abs().max() <= 1e-4
    assert (expected["clip"] - 4).abs() >= 0.1


def test_how_samples_are_cut_does_not_matter() -> None:
    graph = block()
    whole = samples(4, 2)
    sites = sites_of(graph, whole)
    options = FlatQuant(epochs=2, batch=4)
    expected = train(graph, sites, whole, options=options, seed=0)
    for sizes in ((6,), (1, 1, 1, 1, 1, 1), (3, 3)):
        found = train(graph, sites, samples(*sizes), options=options, seed=0)
        for name, values in expected.items():
            own = (*found[name].factors, found[name].w_clip)
            for one, other in zip(own, (*values.factors, values.w_clip), strict=True):
                assert (one - other).abs().max() <= 1e-4  # four steps of 5e-3, sums in another order
    again = train(graph, sites, whole, options=options, seed=0)
    assert all(torch.equal(again[name].factors[0], values.factors[0]) for name, values in expected.items())
    other = train(graph, sites, whole, options=options, seed=1)
    assert not any(torch.equal(other[name].factors[0], values.factors[0]) for name, values in expected.items())


def test_padding_is_not_learned_from() -> None:
    graph, data = block(), samples(2)
    sites = sites_of(graph, data)
    expected = train(graph, sites, data, options=SHORT, seed=0)
    data.batches[0].inputs[0][:, -1] = 1e4
    found = train(graph, sites, data, options=SHORT, seed=0)
    assert all(torch.equal(found[name].w_clip, values.w_clip) for name, values in expected.items())


def test_an_error_that_is_not_finite_names_its_samples() -> None:
    graph, data = block(), samples(2, 2)
    sites = sites_of(graph, data)
    data.batches[1].inputs[0][1, 0] = torch.inf
    with pytest.raises(CalibrationError, match=r"samples 2 to 3 is nan .*flatquant\.rate"):
        train(graph, sites, data, options=SHORT, seed=0)


def test_what_is_learned_is_kept_for_the_passes_after() -> None:
    graph, fit = block(), Fit(samples=samples(2))
    plan = QuantPlan(linear=SPEC, head=SPEC, skip=("*.down_proj",), options=Options(flatquant=SHORT))
    trained = TrainTransforms(plan, fit)
    before = str(graph.graph)
    assert trained(graph) == 1
    assert str(graph.graph) == before
    name = "mlp.gate_up_proj"
    assert set(trained.transforms) == set(trained.scales) == {name}
    assert trained.scales[name].shape == (12,)
    assert set(fit.numbers) == {f"{name}.clip_lo", f"{name}.clip_hi"}
    assert all(0 < ratio < 1 for ratio in fit.numbers.values())
    assert fit.tensors[f"{name}.w_clip"].shape == (16, 1)


def test_shapes_alone_give_shapes_alone() -> None:
    graph = block()
    real, shapes = TrainTransforms(PLAN, Fit(samples=samples(2))), TrainTransforms(PLAN, Fit())
    meta = copy_of(graph)
    for name in attributes(meta):
        path, _, leaf = name.rpartition(".")
        owner = meta.get_submodule(path)
        delattr(owner, leaf)
        owner.register_buffer(leaf, attributes(graph)[name].to("meta"))
    assert real(graph) == shapes(meta) == 2

    def sizes(transforms: dict[str, Transform]) -> dict[str, tuple[torch.Size, torch.Size]]:
        return {name: (each.left.shape, each.right.shape) for name, each in transforms.items()}

    assert sizes(real.transforms) == sizes(shapes.transforms)
    assert all(each.left.is_meta and each.right.is_meta for each in shapes.transforms.values())


def test_nothing_to_learn_and_nothing_to_learn_from() -> None:
    assert TrainTransforms(QuantPlan(linear=None, head=SPEC), Fit())(block()) == 0
    with pytest.raises(ValueError, match="learned from samples, and there are none"):
        TrainTransforms(PLAN, Fit())(block())


def test_no_epochs_leave_everything_where_it_starts() -> None:
    graph, data = block(), samples(2)
    sites = sites_of(graph, data)
    found = train(graph, sites, data, options=FlatQuant(epochs=0), seed=0)
    with torch.no_grad():
        start = LearnedTransforms(sites, 0).values()
    assert all(torch.equal(found[name].factors[0], values.factors[0]) for name, values in start.items())
