"""Stage quantize: the method's passes on every piece with its real weights; what they leave goes into sidecar files.

One file a piece, `weights/<piece>.safetensors`. Codes of four bits or fewer are packed two a byte, low nibble first.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.fx import GraphModule

from passes.base import PassError, run
from passes.fit import CalibrationError, Fit
from passes.graph import attributes, calls, int_of, node_of, twin_of
from passes.invariants import check_lowered, check_quantized, check_rewritten
from passes.lowering import LOWERING
from passes.methods import METHODS
from passes.methods.method import Method
from passes.quant_spec import AttentionSpec, QuantPlan, QuantSpec
from passes.quantize_weights import planned
from passes.store_half import HalfRangeError
from pipeline.calibrate import float_pieces
from pipeline.calibration.states import States
from pipeline.calibration.stream import Means, Stream
from pipeline.capture import ENDS, constants
from pipeline.errors import InputRefused, UsageFault
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.config import ModelConfig
from pipeline.recipe import Recipe
from plugins.int4 import pack_int4, unpack_int4

CONSTANTS = "constants"
QUANTIZED = "quantized"  # folder of the second stream's inputs
ABOUT = "about"


def check_format(recipe: Recipe) -> None:
    """Raise UsageFault for bits, scales and calibration states that the recipe's method cannot do."""
    part, formats = recipe.linear, METHODS[recipe.method].formats
    if part.w_bits < 16 and (part.w_bits, part.a_bits) not in formats:
        known = ", ".join(f"w{w}a{a}" for w, a in sorted(formats, reverse=True))
        raise UsageFault(
            f"method {recipe.method} cannot do w{part.w_bits}a{part.a_bits}; it does {known}; "
            "choose other bits with --set linear.w_bits and linear.a_bits, or another method"
        )
    if recipe.method in ("freeact", "star") and recipe.calibration.states == "clean":
        raise UsageFault(
            f"method {recipe.method} learns from masked and from unmasked tokens; calibration.states is clean, without "
            "masked ones; pass --set calibration.states=noised, or use flatquant"
        )
    if recipe.attention.v_scale == "head_static":
        raise UsageFault(
            f"method {recipe.method} finds no static scales of values; attention.v_scale is head_static; "
            "pass --set attention.v_scale=token"
        )


def quant_plan(recipe: Recipe, config: ModelConfig) -> QuantPlan:
    """The recipe's formats as passes read them; a quantised head has int8 activations."""
    part, attention = recipe.linear, recipe.attention
    linear = QuantSpec(
        w_bits=part.w_bits,
        a_bits=part.a_bits,
        w_group=part.w_group,
        a_group=part.a_group,
        symmetric=part.symmetric,
        w_symmetric=part.w_symmetric,
    )
    return QuantPlan(
        linear=linear if part.w_bits < 16 else None,
        head=QuantSpec(w_bits=8, a_bits=8) if recipe.head.bits == 8 else None,
        embedding_bits=recipe.embedding.bits,
        skip=recipe.skip,
        attention=AttentionSpec(
            k_bits=attention.k_bits,
            v_bits=attention.v_bits,
            prob_bits=attention.prob_bits,
            prob_scale=attention.prob_scale,
        ),
        options=recipe.options(),
        mask_id=config.mask_id,
    )


def simulate(
    graph: GraphModule, recipe: Recipe, config: ModelConfig, numbers: Mapping[str, float] = MappingProxyType({})
) -> dict[str, int]:
    """Float graph -> simulated quantised graph, without calibration: on shapes, or by a method that needs none.

    `numbers` are those that the method learned on the weights. Returns places changed by pass.
    """
    fit = Fit(seed=recipe.calibration.seed, numbers=dict(numbers))
    return run(graph, METHODS[recipe.method].passes(quant_plan(recipe, config), fit), check_quantized)


def packed_names(graph: GraphModule) -> set[str]:
    """Weights of the graph that are codes of at most four bits."""
    dequantized = calls(graph, torch.ops.dllmc.dequantize.default)
    return {str(node_of(node.args[0]).target) for node in dequantized if int_of(node.args[2]) <= 4}


def write_weights(
    checkpoint: Checkpoint,
    recipe: Recipe,
    folder: Path,
    *,
    states: States | None = None,
    means: Means | None = None,
    on_piece: Callable[[str], None],
) -> dict[str, int]:
    """Sidecar files for the whole model; returns places changed by pass, summed over the pieces.

    `states` are what a method that needs calibration learns from, one block at a time, by `means`.
    """
    method, config = METHODS[recipe.method], checkpoint.config
    if method.needs_calibration and states is None:
        raise ValueError(f"method {method.name} needs calibration states")
    changed: Counter[str] = Counter()
    folder.mkdir(exist_ok=True)
    for left in folder.glob("*.safetensors"):  # a model with more blocks may have been here
        left.unlink()
    calibrated = states if method.needs_calibration else None
    with _stream(calibrated, config, means) as stream, _twin(method, calibrated, config, means) as twin:
        for piece, graph in float_pieces(checkpoint):
            fit = Fit(samples=None if piece.name == ENDS else stream, seed=recipe.calibration.seed)
            try:
                changed.update(_quantise(graph, method, quant_plan(recipe, config), fit, stream, twin))
            except PassError as error:
                raise _at_fault(error) from error
            packed = packed_names(graph)
            # Lowered too, so that the files hold whatever the lowered graph reads besides the simulated one's weights.
            run(graph, LOWERING, check_lowered)
            save_file(
                {n: pack_int4(t) if n in packed else t.contiguous() for n, t in attributes(graph).items()},
                folder / f"{piece.name}.safetensors",
                _metadata(packed, fit.numbers),
            )
            on_piece(piece.name)
    save_file(constants(config), folder / f"{CONSTANTS}.safetensors", _metadata(set(), {}))
    return dict(changed)


def _metadata(packed: set[str], numbers: Mapping[str, float]) -> dict[str, str]:
    """One key alone: safetensors writes several in any order, and equal weights are to give equal files."""
    return {ABOUT: json.dumps({"packed": sorted(packed), "numbers": dict(numbers)}, sort_keys=True)}


def _stream(states: States | None, config: ModelConfig, means: Means | None) -> AbstractContextManager[Stream | None]:
    return Stream(states, constants(config)["rope_frequencies"], means=means) if states else nullcontext()


def _twin(
    method: Method, states: States | None, config: ModelConfig, means: Means | None
) -> AbstractContextManager[Stream | None]:
    """The same canvases on their way through the blocks as they will run, where the method wants them."""
    if means is not None and means.folder is not None:
        means = replace(means, folder=means.folder / QUANTIZED)
    return _stream(states if method.pairs else None, config, means)


def _quantise(
    graph: GraphModule, method: Method, plan: QuantPlan, fit: Fit, stream: Stream | None, twin: Stream | None
) -> Counter[str]:
    """One piece, and the streams through it; the ends, which come first, let them in."""
    changed = Counter(run(graph, method.rewrite(plan, fit), check_rewritten))
    entering, learning = (stream, None) if fit.samples is None else (None, stream)
    if entering is not None:
        entering.enter(graph)
    if learning is not None and method.inputs == "float":
        learning.compute(graph)
    if learning is not None and twin is not None:
        fit = replace(fit, quantized=twin, reference=twin_of(graph))
    changed.update(run(graph, method.solving(plan, fit), check_quantized))
    if left := [site for _, site, _ in planned(graph, plan)]:
        raise RuntimeError(f"method {method.name} left in float what the recipe quantises: {', '.join(left)}")
    if learning is not None and method.inputs == "quantized":
        learning.compute(graph)
    changed.update(run(graph, method.finishing(plan, fit), check_quantized))
    if learning is not None:
        learning.advance()
    if twin is not None:
        _pass_on(twin, graph, entering=learning is None)
    return changed


def _pass_on(twin: Stream, graph: GraphModule, *, entering: bool) -> None:
    if entering:
        twin.enter(graph)
    else:
        twin.compute(graph)
        twin.advance()


def _at_fault(error: PassError) -> Exception:
    """What a user can cause is the model's or the samples' fault, all else is ours."""
    cause = error.__cause__
    if isinstance(cause, HalfRangeError):
        return InputRefused(f"{cause}; this model cannot be stored in 16-bit floats")
    return InputRefused(str(cause)) if isinstance(cause, CalibrationError) else error


class Weights:
    """The sidecar files of one model, read tensor by tensor; `numbers` are those its method learned."""

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, Path] = {}
        self._packed: set[str] = set()
        self.numbers: dict[str, float] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                self._files |= dict.fromkeys(file.keys(), path)
                about = json.loads(file.metadata()[ABOUT])
            self._packed |= set(about["packed"])
            self.numbers |= about["numbers"]

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
