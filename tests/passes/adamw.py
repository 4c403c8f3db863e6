"""AdamW as its paper writes it, for methods that learn."""

import torch
from torch import Tensor


def textbook_adamw(parameter: Tensor, gradient: Tensor, state: dict[str, Tensor], rate: float, step: int) -> None:
    """Decoupled weight decay (arXiv 1711.05101, algorithm 2) with the defaults of the field."""
    state.setdefault("m", torch.zeros_like(parameter))
    state.setdefault("v", torch.zeros_like(parameter))
    state["m"] = 0.9 * state["m"] + 0.1 * gradient
    state["v"] = 0.999 * state["v"] + 0.001 * gradient**2
    parameter -= rate * 0.01 * parameter
    parameter -= rate * (state["m"] / (1 - 0.9**step)) / ((state["v"] / (1 - 0.999**step)).sqrt() + 1e-8)
