"""Stage calibrate: noised canvases through the float model, one block in memory at a time, moments of every site out.

Shape letters: N samples, L sequence, D hidden, K input width of a linear.
"""

from collections.abc import Callable, Iterator
from functools import partial

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
    ends: GraphModule | None = None
    with Stream(states, constants(checkpoint.config)["rope_frequencies"], means=means) as stream:
        for piece, graph in float_pieces(checkpoint, keep_ends=True):
            if piece.name == ENDS:
                ends = graph
                stream.enter(ends)
            else:
                for found in stream.through(partial(_observed, graph, num_buckets)):
                    stats.merge(found)
                stream.advance()
            on_piece(piece.name)
        assert ends is not None
        for found in stream.map(partial(_head_observed, ends, num_buckets)):
            stats.merge(found)
    drop_weights(ends)
    return stats


def _observed(block: GraphModule, num_buckets: int, batch: Batch) -> tuple[Tensor, Stats]:
    """The block's output for one batch, and the moments on the way to it."""
    stats, watch = _watched(num_buckets, batch)
    x: Tensor = Observed(block, watch).run(*batch.inputs)
    return x, stats


def _head_observed(ends: GraphModule, num_buckets: int, batch: Batch) -> Stats:
    stats, watch = _watched(num_buckets, batch)
    no_ids = torch.empty(len(batch.valid), 0, dtype=torch.long)
    Observed(ends, watch).run(no_ids, batch.inputs[0])
    return stats


def _watched(num_buckets: int, batch: Batch) -> tuple[Stats, Watcher]:
    """Empty statistics, and what fills them with one batch."""
    stats = Stats(num_buckets)
    buckets = (batch.noise * num_buckets).long().clamp(max=num_buckets - 1)

    def watch(site: str, x: Tensor, _: Tensor) -> None:
        check_activations(x, batch, f"the input of {site}")
        for bucket in range(num_buckets):
            rows = batch.valid & (buckets == bucket)[:, None]
            for state, chosen in zip(STATES, (rows & ~batch.masked, rows & batch.masked), strict=True):
                stats.add(site, state, bucket, x[chosen])

    return stats, watch
