"""Statistics taken block by block are those of the whole model, and one block is in memory at a time."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from passes.stats import STATES, Stats
from pipeline.calibrate import collect_stats
from pipeline.calibration.states import States, builtin_corpus, noised_states
from pipeline.capture import pieces
from pipeline.models.checkpoint import Checkpoint, load_model, open_checkpoint
from pipeline.models.transformer import Transformer
from tests.pipeline.watched import Watched, uncollected

Made = Callable[..., Path]
BUCKETS = 3
# Whole model and single block differ in how torch batches float32 sums; the moments themselves are float64.
TOLERANCE = 2e-5


def states_of(checkpoint: Checkpoint, count: int, seed: int = 0) -> States:
    text = checkpoint.tokenizer()
    corpus = builtin_corpus(count, seed, held_out=False)
    return noised_states(corpus, text, checkpoint.config, length=48, seed=seed)


def stats_of(checkpoint: Checkpoint, states: States) -> Stats:
    return collect_stats(checkpoint, states, num_buckets=BUCKETS, on_piece=lambda _: None)


def whole_inputs(model: Transformer, states: States) -> dict[str, Tensor]:
    """Input [N, L, K] of every linear by our merged name, from one pass of the whole model."""
    found: dict[str, Tensor] = {}
    sites = {"q_proj": "q_k_v_proj", "o_proj": "o_proj", "gate_proj": "gate_up_proj", "down_proj": "down_proj"}
    for name, module in model.named_modules():
        leaf = name.rpartition(".")[2]
        if leaf in sites or name == "head":
            site = name if name == "head" else name.removesuffix(leaf) + sites[leaf]
            module.register_forward_pre_hook(lambda _, inputs, site=site: found.update({site: inputs[0].detach()}))
    positions = torch.arange(states.input_ids.shape[1]).expand(states.input_ids.shape)
    with torch.no_grad():
        model.logits(states.input_ids, positions, states.kv_len)
    return found


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_streamed_moments_are_those_of_the_whole_model(model: Made, family: str) -> None:
    checkpoint = open_checkpoint(model(family, layers=2))
    states = states_of(checkpoint, 37)  # three batches, the last one short
    stats = stats_of(checkpoint, states)
    inputs = whole_inputs(load_model(checkpoint), states)
    valid = torch.arange(states.input_ids.shape[1])[None, :] < states.kv_len[:, None]
    expected: set[tuple[str, str, int]] = set()
    for site, x in inputs.items():
        for bucket in range(BUCKETS):
            rows = (states.noise >= bucket / BUCKETS) & (states.noise < (bucket + 1) / BUCKETS)
            for state in STATES:
                chosen = valid & rows[:, None] & (states.masked if state == "masked" else ~states.masked)
                if not chosen.any():
                    continue
                expected.add((site, state, bucket))
                found, true = stats.table[site, state, bucket], x[chosen].double()
                assert found.count == len(true)
                for moment, value in (
                    (found.total, true.sum(0)),
                    (found.squares, true.square().sum(0)),
                    (found.amax, true.abs().amax(0)),
                ):
                    scale = true.abs().sum(0).max() if moment is found.total else value.abs().max()
                    assert (moment - value).abs().max() <= TOLERANCE * scale, (site, state, bucket)
    assert stats.table.keys() == expected
    assert len(inputs) == 2 * 4 + 1
    assert sum(m.count for (site, _, _), m in stats.table.items() if site == "head") == int(states.kv_len.sum())


def test_the_same_draw_gives_the_same_bytes(model: Made) -> None:
    checkpoint = open_checkpoint(model("llada", layers=1))
    first, again, other = (stats_of(checkpoint, states_of(checkpoint, 20, seed)).tensors() for seed in (0, 0, 1))
    assert list(first) == list(again)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first if name in other)


def test_statistics_survive_their_file_form(model: Made) -> None:
    checkpoint = open_checkpoint(model("llada", layers=1))
    stats = stats_of(checkpoint, states_of(checkpoint, 8))
    again = Stats.from_tensors(stats.tensors(), BUCKETS).tensors()
    assert again.keys() == stats.tensors().keys()
    assert all(torch.equal(value, again[name]) for name, value in stats.tensors().items())


@pytest.mark.parametrize("layers", [2, 4])
def test_one_block_is_in_memory_at_a_time(model: Made, layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the garbage collector's help, which may come late."""
    checkpoint = open_checkpoint(model("llada", layers=layers))
    states = states_of(checkpoint, 4)
    watched = Watched(monkeypatch)
    with uncollected():
        stats_of(checkpoint, states)
    assert watched.alive == [0] * (layers + 1)


def test_pieces_are_told_in_order(model: Made) -> None:
    checkpoint = open_checkpoint(model("llada", layers=2))
    told: list[str] = []
    collect_stats(checkpoint, states_of(checkpoint, 2), num_buckets=1, on_piece=told.append)
    assert told == [piece.name for piece in pieces(checkpoint.config)] == ["ends", "blocks.0", "blocks.1"]
