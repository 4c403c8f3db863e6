"""How far quantisation moves the output of each linear, on full-precision inputs, one piece in memory at a time.

A method that rewrites the graph gives its linears other inputs and outputs: of such a one whole blocks are compared,
in the coordinates of its own residual stream.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx import GraphModule

from passes.graph import drop_weights, set_attributes
from passes.methods import METHODS
from passes.methods.method import Method, no_passes
from passes.observe import Observed
from passes.rotate_stream import stream_rotation
from pipeline.calibrate import float_pieces
from pipeline.calibration.canvas import Canvas
from pipeline.calibration.states import States
from pipeline.capture import ENDS, capture_piece, constants
from pipeline.models.checkpoint import EMBED, Checkpoint
from pipeline.quantize import Weights, simulate, state_of
from pipeline.recipe import Recipe


@torch.no_grad()
def site_errors(checkpoint: Checkpoint, recipe: Recipe, weights: Weights, states: States) -> dict[str, float]:
    """||y_q - y||^2 / ||y||^2 of every linear (or block, and the head), largest first."""
    method = METHODS[recipe.method]
    compare = _Compare(by_linear=method.rewrite is no_passes, turn=_turn(method, checkpoint, recipe))
    canvas = Canvas(states, constants(checkpoint.config)["rope_frequencies"])
    held: tuple[GraphModule, GraphModule] | None = None
    for piece, graph in float_pieces(checkpoint, keep_ends=True):
        # Solved on shapes alone: the codes are in the files.
        shapes = {name: torch.empty(_shape(checkpoint, name), device="meta") for name in piece.weights}
        quantised = capture_piece(checkpoint.config, piece, shapes)
        simulate(quantised, recipe, checkpoint.config, weights.numbers)
        set_attributes(quantised, state_of(quantised, weights))
        if piece.name == ENDS:
            held = graph, quantised
            canvas.enter(graph)
            continue
        canvas.x = compare(piece.name, graph, quantised, canvas.inputs, canvas.valid)
        drop_weights(quantised)
    assert held is not None
    compare("head", *held, (states.input_ids, canvas.x), canvas.valid)
    for ends in held:
        drop_weights(ends)
    return dict(sorted(compare.errors.items(), key=lambda item: -item[1]))


def _shape(checkpoint: Checkpoint, name: str) -> tuple[int, ...]:
    """From the header; a tied head has none of its own."""
    return checkpoint.entries[checkpoint.tensor_names.get(name, checkpoint.tensor_names[EMBED])].shape


def _turn(method: Method, checkpoint: Checkpoint, recipe: Recipe) -> Callable[[Tensor], Tensor]:
    """From the model's residual stream to that of the method's graph."""
    if not method.rotates_stream:
        return lambda x: x
    return stream_rotation(checkpoint.config.hidden_size, recipe.calibration.seed).apply


class _Compare:
    """Runs a piece at full precision and quantised on equal inputs, and keeps the errors by name."""

    def __init__(self, *, by_linear: bool, turn: Callable[[Tensor], Tensor]) -> None:
        self.by_linear, self.turn = by_linear, turn
        self.errors: dict[str, float] = {}

    def __call__(
        self, name: str, graph: GraphModule, quantised: GraphModule, inputs: tuple[Tensor, ...], valid: Tensor
    ) -> Tensor:
        """The piece's float output."""
        if self.by_linear:
            return self._linears(graph, quantised, inputs, valid)
        result: Tensor | tuple[Tensor, ...] = graph(*inputs)
        if isinstance(result, tuple):  # the ends: embeddings, logits
            ids, x = inputs
            exact, found = result[-1], quantised(ids, self.turn(x))[-1]
        else:
            x, *rest = inputs
            exact, found = self.turn(result), quantised(self.turn(x), *rest)
        self._note(name, exact[valid], found[valid])
        return result[-1] if isinstance(result, tuple) else result

    def _linears(self, graph: GraphModule, quantised: GraphModule, inputs: tuple[Tensor, ...], valid: Tensor) -> Tensor:
        exact: dict[str, Tensor] = {}

        def remember(site: str, _: Tensor, y: Tensor) -> None:
            exact[site] = y[valid]

        def measure(site: str, _: Tensor, y: Tensor) -> None:
            self._note(site, exact[site], y[valid])

        result: Tensor = Observed(graph, remember).run(*inputs)
        Observed(quantised, measure).run(*inputs)
        return result

    def _note(self, name: str, exact: Tensor, found: Tensor) -> None:
        power = exact.square().sum().clamp_min(torch.finfo(torch.float32).tiny)
        self.errors[name] = float((found - exact).square().sum() / power)
