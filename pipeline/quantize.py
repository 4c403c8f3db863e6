"""Stage quantize: the method's passes on every piece with its real weights; what they leave goes into sidecar files.

One file a piece, `weights/<piece>.safetensors`. Codes of four bits or fewer are packed two a byte, low nibble first.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.fx import GraphModule

from passes.base import PassError, run
from passes.graph import attributes, calls, int_of, node_of
from passes.invariants import check_lowered, check_quantized
from passes.lowering import LOWERING
from passes.methods import METHODS
from passes.quant_spec import QuantPlan, QuantSpec
from passes.store_half import HalfRangeError
from pipeline.calibrate import float_pieces
from pipeline.capture import constants
from pipeline.errors import InputRefused
from pipeline.models.checkpoint import Checkpoint
from pipeline.recipe import Recipe
from plugins.int4 import pack_int4, unpack_int4

CONSTANTS = "constants"


def quant_plan(recipe: Recipe) -> QuantPlan:
    """The recipe's formats as passes read them; a quantised head has int8 activations."""
    part = recipe.linear
    linear = QuantSpec(
        w_bits=part.w_bits, a_bits=part.a_bits, w_group=part.w_group, a_group=part.a_group, symmetric=part.symmetric
    )
    return QuantPlan(
        linear=linear if part.w_bits < 16 else None,
        head=QuantSpec(w_bits=8, a_bits=8) if recipe.head.bits == 8 else None,
        embedding_bits=recipe.embedding.bits,
        skip=recipe.skip,
    )


def simulate(graph: GraphModule, recipe: Recipe) -> dict[str, int]:
    """Float graph -> simulated quantised graph, by the recipe's method; places changed by pass."""
    return run(graph, METHODS[recipe.method].passes(quant_plan(recipe)), check_quantized)


def packed_names(graph: GraphModule) -> set[str]:
    """Weights of the graph that are codes of at most four bits."""
    dequantized = calls(graph, torch.ops.dllmc.dequantize.default)
    return {str(node_of(node.args[0]).target) for node in dequantized if int_of(node.args[2]) <= 4}


@torch.no_grad()
def write_weights(
    checkpoint: Checkpoint, recipe: Recipe, folder: Path, *, on_piece: Callable[[str], None]
) -> dict[str, int]:
    """Sidecar files for the whole model; returns places changed by pass, summed over the pieces."""
    changed: dict[str, int] = {}
    folder.mkdir(exist_ok=True)
    for left in folder.glob("*.safetensors"):  # a model with more blocks may have been here
        left.unlink()
    for piece, graph in float_pieces(checkpoint):
        try:
            counts = simulate(graph, recipe)
        except PassError as error:
            if isinstance(error.__cause__, HalfRangeError):
                raise InputRefused(f"{error.__cause__}; this model cannot be stored in 16-bit floats") from error
            raise
        for name, count in counts.items():
            changed[name] = changed.get(name, 0) + count
        packed = packed_names(graph)
        # Lowered too, so that the files hold whatever the lowered graph reads besides the simulated one's weights.
        run(graph, LOWERING, check_lowered)
        save_file(
            {n: pack_int4(t) if n in packed else t.contiguous() for n, t in attributes(graph).items()},
            folder / f"{piece.name}.safetensors",
            {"packed": "\n".join(sorted(packed))},
        )
        on_piece(piece.name)
    save_file(constants(checkpoint.config), folder / f"{CONSTANTS}.safetensors", {"packed": ""})
    return changed


class Weights:
    """The sidecar files of one model, read tensor by tensor."""

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, Path] = {}
        self._packed: set[str] = set()
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                self._files |= dict.fromkeys(file.keys(), path)
                self._packed |= set(file.metadata()["packed"].split("\n"))

    @property
    def names(self) -> set[str]:
        """Every weight in the files."""
        return set(self._files)

    def is_packed(self, name: str) -> bool:
        """Whether the file holds two codes a byte."""
        return name in self._packed

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the tensor as the graph reads it, from the file's header."""
        with safe_open(self._files[name], "pt") as file:
            *outer, last = file.get_slice(name).get_shape()
        return (*outer, last * 2 if name in self._packed else last)

    def stored(self, name: str) -> Tensor:
        """The tensor as it lies in the file, codes packed."""
        with safe_open(self._files[name], "pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def __getitem__(self, name: str) -> Tensor:
        """The tensor as the graph reads it, codes one a byte."""
        stored = self.stored(name)
        return unpack_int4(stored) if name in self._packed else stored

    def all(self) -> dict[str, Tensor]:
        """Every tensor as the graph reads it."""
        return {name: self[name] for name in self._files}


def state_of(graph: GraphModule, weights: Weights) -> dict[str, Tensor]:
    """The weights that one graph reads."""
    return {name: weights[name] for name in attributes(graph)}
