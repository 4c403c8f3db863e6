"""Stage calibrate: noised canvases through the float model, one block in memory at a time, moments of every site out.

Shape letters: N samples, L sequence, D hidden, K input width of a linear.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.fx import GraphModule

from passes.graph import attributes, drop_weights
from passes.observe import Observed
from passes.stats import STATES, Stats
from pipeline.calibration.states import States
from pipeline.capture import ENDS, Piece, capture_piece, constants, pieces
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.transformer import rotary_angles

BATCH = 16


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


class Canvas:
    """One batch on its way through the blocks: the residual stream and what attention needs."""

    def __init__(self, states: States, frequencies: Tensor) -> None:
        length = states.input_ids.shape[1]
        self.states = states
        self.x = torch.empty(0)
        self.cos, self.sin = rotary_angles(torch.arange(length).expand(states.input_ids.shape), frequencies)
        self.valid = torch.arange(length)[None, :] < states.kv_len[:, None]
        self.visible = self.valid[:, None, None, :].expand(-1, 1, length, -1)

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """What the graph of the next block takes."""
        return self.x, self.cos, self.sin, self.visible, self.states.masked.int()

    def enter(self, ends: GraphModule) -> None:
        """The embeddings become the residual stream; the head, which is in the same graph, gets no rows."""
        width = attributes(ends)["embed.weight"].shape[1]
        self.x, _ = ends(self.states.input_ids, torch.empty(len(self.valid), 0, width))


@torch.no_grad()
def collect_stats(
    checkpoint: Checkpoint, states: States, *, num_buckets: int, on_piece: Callable[[str], None]
) -> Stats:
    """Moments of the inputs of all linears by mask state and noise bucket; padding rows never count."""
    stats = Stats(num_buckets)
    frequencies = constants(checkpoint.config)["rope_frequencies"]
    canvases = [Canvas(batch, frequencies) for batch in states.batches(BATCH)]
    ends: GraphModule | None = None
    for piece, graph in float_pieces(checkpoint, keep_ends=True):
        for canvas in canvases:
            if piece.name == ENDS:
                canvas.enter(graph)
            else:
                canvas.x = _observed(graph, canvas, stats, canvas.inputs)
        if piece.name == ENDS:
            ends = graph
        on_piece(piece.name)
    assert ends is not None
    for canvas in canvases:
        _observed(ends, canvas, stats, (canvas.states.input_ids, canvas.x))
    drop_weights(ends)
    return stats


def _observed(graph: GraphModule, canvas: Canvas, stats: Stats, inputs: tuple[Tensor, ...]) -> Tensor:
    buckets = (canvas.states.noise * stats.num_buckets).long().clamp(max=stats.num_buckets - 1)

    def watch(site: str, x: Tensor, _: Tensor) -> None:
        for bucket in range(stats.num_buckets):
            rows = canvas.valid & (buckets == bucket)[:, None]
            for state, chosen in zip(STATES, (rows & ~canvas.states.masked, rows & canvas.states.masked), strict=True):
                stats.add(site, state, bucket, x[chosen])

    result: Tensor = Observed(graph, watch).run(*inputs)
    return result
