"""What the model answers at full precision, one piece in memory at a time."""

from collections.abc import Sequence

import torch
from torch.fx import GraphModule

from passes.graph import drop_weights
from pipeline.backends.backend import OUTPUTS, Feeds, Record
from pipeline.calibrate import float_pieces
from pipeline.calibration.canvas import Canvas
from pipeline.calibration.states import States
from pipeline.capture import ENDS, constants
from pipeline.models.checkpoint import Checkpoint


@torch.no_grad()
def records(checkpoint: Checkpoint, batches: Sequence[tuple[States, Feeds]], *, top_k: int) -> list[Record]:
    """The record of every batch of canvases, as a session that holds the whole model in float32 would give it."""
    frequencies = constants(checkpoint.config)["rope_frequencies"]
    canvases = [Canvas(states, frequencies) for states, _ in batches]
    ends: GraphModule | None = None
    for piece, graph in float_pieces(checkpoint, keep_ends=True):
        for canvas in canvases:
            if piece.name == ENDS:
                canvas.enter(graph)
            else:
                canvas.x = graph(*canvas.inputs)
        if piece.name == ENDS:
            ends = graph
    assert ends is not None
    found = [_record(ends, canvas, feeds, top_k) for canvas, (_, feeds) in zip(canvases, batches, strict=True)]
    drop_weights(ends)
    return found


def _record(ends: GraphModule, canvas: Canvas, feeds: Feeds, top_k: int) -> Record:
    """Canvas by canvas: the logits of a batch may need more memory than the model."""
    rows = []
    bias, inv_temp = torch.from_numpy(feeds.logit_bias), torch.from_numpy(feeds.inv_temp)
    for b, index in enumerate(torch.from_numpy(feeds.head_index)):
        _, logits = ends(canvas.states.input_ids[b : b + 1, index], canvas.x[b : b + 1, index])
        rows.append(torch.ops.dllmc.record(logits, bias, inv_temp[b : b + 1], top_k))
    arrays = (torch.cat(column).numpy() for column in zip(*rows, strict=True))
    return Record(**dict(zip(OUTPUTS, arrays, strict=True)))
