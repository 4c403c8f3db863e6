"""What the sidecar files hold, by part of the model: formats, bytes here, bytes at 16 bits."""

from dataclasses import dataclass
from fractions import Fraction

import torch

from passes.gate_transforms import gate_of
from pipeline.bundle import FormatSize
from pipeline.capture import pieces
from pipeline.models.checkpoint import Checkpoint
from pipeline.quantize import Weights
from pipeline.recipe import Recipe, linear_names

CODES, HALF = "codes", "weight_half"
GRID = ("w_scale", "w_zero", "w_sum")
NORM_OR_BIAS = ("weight", "bias")


@dataclass(frozen=True, kw_only=True)
class Account:
    """Sizes by part and format; linears are those of the graph, where q, k, v and gate, up are merged."""

    formats: tuple[FormatSize, ...]
    tensors_used: int
    tensors_total: int
    linears_quantised: int
    linears_kept: int


def take_account(checkpoint: Checkpoint, recipe: Recipe, weights: Weights) -> Account:
    """Count every weight of the sidecar files under exactly one part and format.

    Raises RuntimeError when a linear is not in the format that the recipe gives it: a silent skip is our bug.
    """
    _check_formats(checkpoint, recipe, weights)
    sizes: dict[tuple[str, str], list[int]] = {}
    for name in sorted(weights.names):
        stored = weights.stored(name)
        part, kind = _part(name), _format(name, recipe, stored.dtype)
        elements = stored.numel() * (2 if weights.is_packed(name) else 1)
        row = sizes.setdefault((part, kind), [0, 0, 0])
        row[0] += 1
        row[1] += stored.nbytes
        # Grids and transforms exist only because of quantisation: at 16 bits they would not be there.
        row[2] += 2 * elements if name.rpartition(".")[2] in (CODES, HALF, *NORM_OR_BIAS) else 0
    leaves = [name.rpartition(".")[2] for name in weights.names if name.startswith("blocks.")]
    read = {name for piece in pieces(checkpoint.config) for name in piece.weights}
    return Account(
        formats=tuple(
            FormatSize(part=part, format=kind, tensors=row[0], size_bytes=row[1], fp16_bytes=row[2])
            for (part, kind), row in sorted(sizes.items())
        ),
        tensors_used=len(read & set(checkpoint.tensor_names)),
        tensors_total=len(checkpoint.tensor_names),
        linears_quantised=leaves.count(CODES),
        linears_kept=leaves.count(HALF),
    )


def gate_shares(weights: Weights, share: int) -> dict[str, Fraction]:
    """The part of its input channels that each mask state has for itself, by linear of a block; `share` as asked."""
    found = {}
    for name in sorted(weights.names):
        site, _, leaf = name.rpartition(".")
        if leaf == "left":
            factors = weights.shape(name)[0], weights.shape(f"{site}.right")[0]
            gate = gate_of(factors, share)
            found[site.rpartition(".")[2]] = Fraction(gate.size, factors[gate.axis])
    return found


def _check_formats(checkpoint: Checkpoint, recipe: Recipe, weights: Weights) -> None:
    """Every linear, the head and the embedding by name, against what the recipe says of each."""
    quantised = recipe.linear.w_bits < 16
    expected = {
        name: CODES if quantised and not recipe.skips(name) else HALF for name in linear_names(checkpoint.config)
    }
    expected |= {"head": CODES if recipe.head.bits < 16 else HALF}
    expected |= {"embed": CODES if recipe.embedding.bits < 16 else HALF}
    stored = (name.rpartition(".") for name in weights.names)
    found = {site: leaf for site, _, leaf in stored if leaf in (CODES, HALF)}
    wrong = sorted(site for site in expected.keys() | found.keys() if expected.get(site) != found.get(site))
    if wrong:
        raise RuntimeError(f"not stored as the recipe says: {', '.join(wrong)}")


def _part(name: str) -> str:
    site, _, leaf = name.rpartition(".")
    if not site:
        return "constants"
    if site in ("embed", "head"):
        return {"embed": "embedding", "head": "head"}[site]
    if leaf in (CODES, HALF, *GRID):
        return "linears"
    return "norms and biases" if leaf in NORM_OR_BIAS else "transforms"


def _format(name: str, recipe: Recipe, dtype: torch.dtype) -> str:
    site, _, leaf = name.rpartition(".")
    if leaf == HALF:
        return "fp16"
    if leaf not in (CODES, *GRID):
        return str(dtype).removeprefix("torch.").replace("float", "fp")
    if site in ("embed", "head"):
        return "int8 per row" if site == "embed" else "int8 per channel, activations int8 per token"
    part = recipe.linear
    skewed = "" if part.w_symmetric else " asymmetric"
    weights = f"int{part.w_bits}{skewed} {f'group {part.w_group}' if part.w_group else 'per channel'}"
    grid = "" if part.symmetric else " asymmetric"
    groups = f"group {part.a_group}" if part.a_group else "per token"
    return weights + (f", activations int{part.a_bits}{grid} {groups}" if part.a_bits < 16 else "")
