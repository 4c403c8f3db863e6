"""How far quantisation moves the output of each linear, on full-precision inputs, one piece in memory at a time."""

import torch
from torch import Tensor
from torch.fx import GraphModule

from passes.graph import drop_weights, set_attributes
from passes.observe import Observed
from pipeline.calibrate import Canvas, float_pieces
from pipeline.calibration.states import States
from pipeline.capture import ENDS, capture_piece, constants
from pipeline.models.checkpoint import EMBED, Checkpoint
from pipeline.quantize import Weights, simulate, state_of
from pipeline.recipe import Recipe


@torch.no_grad()
def site_errors(checkpoint: Checkpoint, recipe: Recipe, weights: Weights, states: States) -> dict[str, float]:
    """||y_q - y||^2 / ||y||^2 of every linear, largest first."""
    canvas = Canvas(states, constants(checkpoint.config)["rope_frequencies"])
    errors: dict[str, float] = {}
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
        canvas.x = _compare(graph, quantised, canvas.inputs, canvas.valid, errors)
        drop_weights(quantised)
    assert held is not None
    _compare(*held, (states.input_ids, canvas.x), canvas.valid, errors)
    for ends in held:
        drop_weights(ends)
    return dict(sorted(errors.items(), key=lambda item: -item[1]))


def _shape(checkpoint: Checkpoint, name: str) -> tuple[int, ...]:
    """From the header; a tied head has none of its own."""
    return checkpoint.entries[checkpoint.tensor_names.get(name, checkpoint.tensor_names[EMBED])].shape


def _compare(
    graph: GraphModule,
    quantised: GraphModule,
    inputs: tuple[Tensor, ...],
    valid: Tensor,
    errors: dict[str, float],
) -> Tensor:
    exact: dict[str, Tensor] = {}

    def remember(site: str, _: Tensor, y: Tensor) -> None:
        exact[site] = y[valid]

    def measure(site: str, _: Tensor, y: Tensor) -> None:
        power = exact[site].square().sum().clamp_min(torch.finfo(torch.float32).tiny)
        errors[site] = float((y[valid] - exact[site]).square().sum() / power)

    result: Tensor = Observed(graph, remember).run(*inputs)
    Observed(quantised, measure).run(*inputs)
    return result
