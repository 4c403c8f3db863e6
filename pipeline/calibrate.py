"""Stage calibrate: noised canvases through the float model, one block in memory at a time, moments of every site out.

Shape letters: N samples, L sequence, D hidden, K input width of a linear.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor
from torch.fx import GraphModule

from passes.fit import Batch
from passes.graph import drop_weights
from passes.observe import Observed, Watcher
from passes.stats import STATES, Stats
from pipeline.calibration.states import States
from pipeline.calibration.stream import Means, Stream, check_activations
from pipeline.capture import ENDS, Piece, capture_piece, constants, pieces
from pipeline.models.checkpoint import Checkpoint

Result = TypeVar("Result")


def float_pieces(checkpoint: Checkpoint, *, keep_ends: bool = False) -> Iterator[tuple[Piece, GraphModule]]:
    """Every piece with its real weights in float32, one at a time: the last one loses them when the next is asked for.

    With `keep_ends` the ends, which come first, keep theirs until the caller drops them.
    """
    for piece in pieces(checkpoint.config):
        graph = capture_piece(
            checkpoint.config, piece, {name: checkpoint.tensor(name).float() for name in piece.weights}
        )
        yield piece, graph
        if not (keep_ends and piece.name == ENDS):
            drop_weights(graph)


def observe_linears(
    checkpoint: Checkpoint,
    states: States,
    watching: Callable[[Batch], tuple[Watcher, Result]],
    *,
    means: Means | None = None,
    on_piece: Callable[[str], None],
) -> Iterator[Result]:
    """The canvases through the float model, a watcher for every batch of every block, and last of the head.

    Yields what `watching` gave beside each, after it has seen its batch; `on_piece` hears of the ends first.
    """
    ends: GraphModule | None = None
    with Stream(states, constants(checkpoint.config)["rope_frequencies"], means=means) as stream:
        for piece, graph in float_pieces(checkpoint, keep_ends=True):
            if piece.name == ENDS:
                ends = graph
                stream.enter(ends)
            else:
                yield from stream.through(partial(_block_observed, graph, watching))
                stream.advance()
            on_piece(piece.name)
        assert ends is not None
        yield from stream.map(partial(_head_observed, ends, watching))
    drop_weights(ends)


def _block_observed(
    block: GraphModule, watching: Callable[[Batch], tuple[Watcher, Result]], batch: Batch
) -> tuple[Tensor, Result]:
    watch, result = watching(batch)
    x: Tensor = Observed(block, watch).run(*batch.inputs)
    return x, result


def _head_observed(ends: GraphModule, watching: Callable[[Batch], tuple[Watcher, Result]], batch: Batch) -> Result:
    watch, result = watching(batch)
    no_ids = torch.empty(len(batch.valid), 0, dtype=torch.long)
    Observed(ends, watch).run(no_ids, batch.inputs[0])
    return result


@torch.no_grad()
def collect_stats(
    checkpoint: Checkpoint,
    states: States,
    *,
    num_buckets: int,
    on_piece: Callable[[str], None],
    means: Means | None = None,
) -> Stats:
    """Moments of the inputs of all linears by mask state and noise bucket; padding rows never count.

    Raises InputRefused, with layer and sample, where an input is not finite or has one value everywhere.
    """
    stats = Stats(num_buckets)
    for found in observe_linears(checkpoint, states, partial(_watched, num_buckets), means=means, on_piece=on_piece):
        stats.merge(found)
    return stats


def _watched(num_buckets: int, batch: Batch) -> tuple[Watcher, Stats]:
    """What fills statistics with one batch, and these, still empty."""
    stats = Stats(num_buckets)
    buckets = (batch.noise * num_buckets).long().clamp(max=num_buckets - 1)

    def watch(site: str, x: Tensor, _: Tensor) -> None:
        check_activations(x, batch, f"the input of {site}")
        for bucket in range(num_buckets):
            rows = batch.valid & (buckets == bucket)[:, None]
            for state, chosen in zip(STATES, (rows & ~batch.masked, rows & batch.masked), strict=True):
                stats.add(site, state, bucket, x[chosen])

    return watch, stats
