"""One batch of canvases on its way through the blocks. Shape letters: B batch, L sequence, D hidden."""

import torch
from torch import Tensor
from torch.fx import GraphModule

from passes.graph import attributes
from pipeline.calibration.states import States
from pipeline.models.transformer import rotary_angles

BATCH = 16
BATCH_TOKENS = 4096  # an MLP's inner activations of one batch are held at once: of 8B models some 400 MB


def batch_size(states: States) -> int:
    """Canvases to compute at a time: `BATCH`, or fewer where they are long."""
    return max(1, min(BATCH, BATCH_TOKENS // states.input_ids.shape[1]))


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
        return self.inputs_of(self.x)

    def inputs_of(self, x: Tensor) -> tuple[Tensor, ...]:
        """The same, of a residual stream that lies elsewhere."""
        return x, self.cos, self.sin, self.visible, self.states.masked.int()

    def enter(self, ends: GraphModule) -> None:
        """The embeddings become the residual stream."""
        self.x = self.embedded(ends)

    def embedded(self, ends: GraphModule) -> Tensor:
        """The embeddings [B, L, D]; the head, which is in the same graph, gets no rows."""
        # The table may be in half by now, or codes and their scales, which are one column.
        width = max(value.shape[1] for name, value in attributes(ends).items() if name.startswith("embed."))
        x: Tensor
        x, _ = ends(self.states.input_ids, torch.empty(len(self.valid), 0, width))
        return x
