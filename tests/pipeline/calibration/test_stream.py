"""The stream of a calibration: inputs of every block as the whole model has them, whoever computes and stores them."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from passes.fit import Batch, Samples
from passes.methods import METHODS
from pipeline.calibrate import collect_stats, float_pieces
from pipeline.calibration.canvas import BATCH, BATCH_TOKENS, batch_size
from pipeline.calibration.states import Sample, States, make_states
from pipeline.calibration.stream import Means, Stream
from pipeline.capture import ENDS, constants
from pipeline.errors import InputRefused
from pipeline.models.checkpoint import Checkpoint, load_model, open_checkpoint, write_checkpoint
from pipeline.models.transformer import Transformer
from pipeline.quantize import write_weights
from tests.pipeline.fitted import quick_recipe
from tests.pipeline.models.folders import make_config, random_state

ROOT = Path(__file__).parents[3]
SAMPLES = 21


@pytest.fixture(params=["llada", "dream"])
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Checkpoint:
    return saved(tmp_path / "model", request.param)


def saved(
    folder: Path, family: str = "llada", change: Callable[[dict[str, Tensor]], Any] = lambda _: None
) -> Checkpoint:
    config = make_config(family, num_layers=3)
    state = random_state(config)
    change(state)
    write_checkpoint(folder, config, state, dtype=torch.float32)
    return open_checkpoint(folder)


def states_of(checkpoint: Checkpoint, count: int = SAMPLES) -> States:
    draw = torch.Generator().manual_seed(1)
    sizes = torch.randint(3, 12, (count,), generator=draw).tolist()
    samples = [Sample(torch.randint(0, 80, (size,), generator=draw).tolist(), 1) for size in sizes]
    return make_states(samples, checkpoint.config, seed=0, noised=True)


def stream_of(checkpoint: Checkpoint, **options: Any) -> Stream:
    return Stream(states_of(checkpoint), constants(checkpoint.config)["rope_frequencies"], **options)


def inputs_of_blocks(checkpoint: Checkpoint, stream: Stream) -> Iterator[list[Batch]]:
    """All batches before each block and after the last."""
    for piece, graph in float_pieces(checkpoint):
        if piece.name == ENDS:
            stream.enter(graph)
        else:
            yield list(stream)
            stream.compute(graph)
            stream.advance()
    yield list(stream)


def whole_inputs(model: Transformer, states: States) -> list[Tensor]:
    """The residual stream [N, L, D] before each block and after the last, from one pass of the whole model."""
    found: list[Tensor] = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
    model.norm.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
    positions = torch.arange(states.input_ids.shape[1]).expand(states.input_ids.shape)
    with torch.no_grad():
        model.logits(states.input_ids, positions, states.kv_len)
    return found


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("disk", [False, True])
def test_inputs_are_those_of_the_whole_model(checkpoint: Checkpoint, workers: int, disk: bool, tmp_path: Path) -> None:
    folder = tmp_path / "cache" if disk else None
    states = states_of(checkpoint)
    expected = whole_inputs(load_model(checkpoint), states)
    with stream_of(checkpoint, batch=4, means=Means(workers=workers, folder=folder)) as stream:
        found = list(inputs_of_blocks(checkpoint, stream))
        assert folder is None or len(list(folder.iterdir())) == 6
    assert folder is None or not folder.exists()
    assert len(found) == len(expected) == 4
    for batches, whole in zip(found, expected, strict=True):
        assert [batch.first for batch in batches] == [0, 4, 8, 12, 16, 20]
        for batch in batches:
            part = slice(batch.first, batch.first + 4)
            length = int(states.kv_len[part].max())
            x, true = batch.inputs[0][batch.valid], whole[part, :length][batch.valid]
            assert (x - true).abs().max() <= 2e-6 * true.abs().max()  # sums of other shapes
            assert torch.equal(batch.masked, states.masked[part, :length])
            assert torch.equal(batch.inputs[4], batch.masked.int())
            assert torch.equal(batch.noise, states.noise[part])
            assert torch.equal(batch.valid.sum(1), states.kv_len[part])


def second_moment(samples: Samples) -> Tensor:
    """As a solver sums it, in the order in which the batches come."""
    total = torch.zeros(())
    for one in samples.map(lambda batch: batch.inputs[0][batch.valid].T @ batch.inputs[0][batch.valid]):
        total = total + one
    return total


def test_workers_and_caches_change_no_bit(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path / "model")
    ways = [Means(), Means(workers=2, folder=tmp_path / "cache"), Means(workers=5)]
    found, stats = [], []
    for means in ways:
        with stream_of(checkpoint, batch=2, means=means) as stream:
            found.append([second_moment(stream) for _ in inputs_of_blocks(checkpoint, stream)])
        one = collect_stats(checkpoint, states_of(checkpoint), num_buckets=2, means=means, on_piece=lambda _: None)
        stats.append(one.tensors())
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], other, strict=True))
    for tensors in stats[1:]:
        assert list(tensors) == list(stats[0])
        assert all(torch.equal(x, stats[0][name]) for name, x in tensors.items())


def test_the_inputs_stay_until_the_stream_advances(tmp_path: Path) -> None:
    """A method that learns from a block's inputs may need them after the outputs."""
    checkpoint = saved(tmp_path / "model")
    with stream_of(checkpoint) as stream:
        pieces = float_pieces(checkpoint)
        stream.enter(next(pieces)[1])
        before = [batch.inputs[0].clone() for batch in stream]
        stream.compute(next(pieces)[1])
        assert all(torch.equal(batch.inputs[0], x) for batch, x in zip(stream, before, strict=True))
        stream.advance()
        assert not any(torch.equal(batch.inputs[0], x) for batch, x in zip(stream, before, strict=True))


@pytest.mark.parametrize(("length", "size"), [(8, BATCH), (BATCH_TOKENS // BATCH, BATCH), (2048, 2), (9999, 1)])
def test_long_canvases_come_in_small_batches(length: int, size: int) -> None:
    samples = [Sample([1] * length, 0), Sample([1], 0)]
    assert batch_size(make_states(samples, make_config("llada"), seed=0, noised=False)) == size


HUGE = 3e38  # finite, but not after a product


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("blocks.1.mlp_norm.weight", HUGE, "the input of blocks.1.mlp.gate_up_proj has values that are not finite"),
        ("blocks.2.attn.v_proj.weight", HUGE, "the input of blocks.2.attn.o_proj has values that are not finite"),
        ("blocks.1.mlp.up_proj.weight", 0.0, "the input of blocks.1.mlp.down_proj is 0 everywhere"),
        ("norm.weight", 0.0, "the input of head is 0 everywhere"),
    ],
)
@pytest.mark.parametrize("workers", [1, 3])
def test_activations_that_teach_nothing_are_refused(
    tmp_path: Path, name: str, value: float, message: str, workers: int
) -> None:
    checkpoint = saved(tmp_path / "model", change=lambda state: state[name].fill_(value))
    with pytest.raises(InputRefused, match=f"^{message} in calibration sample 0; .*check the weights") as found:
        collect_stats(
            checkpoint, states_of(checkpoint), num_buckets=1, means=Means(workers=workers), on_piece=lambda _: None
        )
    assert "\n" not in str(found.value)


def overflow_at_85(state: dict[str, Tensor]) -> None:
    """Channel 0 is zero for every token but this one, and the gain of a norm makes infinity of anything else."""
    state["embed.weight"][:, 0] = 0.0
    state["embed.weight"][85, 0] = 1.0
    for name in ("blocks.0.attn.o_proj", "blocks.0.mlp.down_proj", "blocks.1.attn.o_proj"):
        state[f"{name}.weight"][0] = 0.0
    state["blocks.1.mlp_norm.weight"][0] = HUGE


@pytest.mark.parametrize("disk", [False, True])
def test_the_sample_at_fault_is_named(tmp_path: Path, disk: bool) -> None:
    """And the linear that first shows it."""
    checkpoint = saved(tmp_path / "model", change=overflow_at_85)
    samples = [Sample([1, 2, 85 if n == 13 else 3], 0) for n in range(SAMPLES)]
    states = make_states(samples, checkpoint.config, seed=0, noised=False)
    folder = tmp_path / "cache" if disk else None
    with (
        pytest.raises(InputRefused, match=r"the input of blocks\.1\.mlp\.gate_up_proj has .* finite in .* sample 13;"),
        Stream(states, constants(checkpoint.config)["rope_frequencies"], batch=4, means=Means(folder=folder)) as stream,
    ):
        list(inputs_of_blocks(checkpoint, stream))
    assert folder is None or not folder.exists()


@pytest.mark.parametrize("skip", [(), ("skip=[blocks.0.attn.o_proj,blocks.0.mlp.down_proj]",)], ids=["all", "skipped"])
@pytest.mark.parametrize(("name", "site"), [("attn.v_proj", "attn.o_proj"), ("mlp.up_proj", "mlp.down_proj")])
@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.needs_calibration])
def test_dead_inputs_are_refused_where_weights_are_written(
    tmp_path: Path, method: str, name: str, site: str, skip: tuple[str, ...]
) -> None:
    """Which nothing need have collected moments before; at linears that are left in float, too."""
    checkpoint = saved(tmp_path / "model", change=lambda state: state[f"blocks.0.{name}.weight"].fill_(0.0))
    states, recipe = states_of(checkpoint), quick_recipe(method, (4, 4), *skip)
    with pytest.raises(
        InputRefused, match=rf"^the input of blocks\.0\.{site} is 0 everywhere in calibration sample 0;"
    ):
        write_weights(checkpoint, recipe, tmp_path / "weights", states=states, on_piece=lambda _: None)
