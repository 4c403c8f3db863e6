"""The recipe: one YAML page that says what is quantised, how it is calibrated, lowered, judged and run by default.

Bits of 16 mean float. A group of 0 means the whole row: per channel for weights, per token for activations.
How a recipe is read from a file, and what `--set` does, is in `recipe_file.py`.
"""

from __future__ import annotations

from dataclasses import asdict
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    StrictStr,
    model_validator,
)

from passes.options import Awq, DuQuant, FlatQuant, FreeAct, Gptq, Options, QuaRot, SmoothQuant, Star, Tac
from pipeline.calibration.sources import check_source
from pipeline.errors import UsageFault
from pipeline.folder import GUIDED, MODEL, MODEL_DATA, SCORE
from pipeline.runner.settings import GenerateOptions, read_options

if TYPE_CHECKING:
    from pipeline.models.config import ModelConfig

Share = Annotated[float, Field(ge=0, le=1)]
GroupSize = Annotated[int, Field(ge=0, le=65536, multiple_of=16)]

# Weight and activation bits that an op or a standard ONNX operator computes.
LINEAR_FORMATS = frozenset({(16, 16), (8, 16), (4, 16), (3, 16), (8, 8), (4, 8), (4, 4)})


class Part(BaseModel):
    """A section: frozen, exact types, no key that is not declared."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class LinearFormat(Part):
    """Number formats of the linears in the blocks; `symmetric` is the activations' grid, `w_symmetric` the weights'."""

    w_bits: Literal[16, 8, 4, 3] = 16
    a_bits: Literal[16, 8, 4] = 16
    w_group: GroupSize = 0
    a_group: GroupSize = 0
    symmetric: bool = True
    w_symmetric: bool = True

    @model_validator(mode="after")
    def _combine(self) -> LinearFormat:
        if (self.w_bits, self.a_bits) not in LINEAR_FORMATS:
            known = ", ".join(f"w{w}a{a}" for w, a in sorted(LINEAR_FORMATS, reverse=True))
            raise ValueError(f"w_bits {self.w_bits} with a_bits {self.a_bits} is not supported; supported: {known}")
        if self.w_bits == 16 and self.w_group:
            raise ValueError("w_group needs w_bits below 16")
        if self.a_bits == 16 and (self.a_group or not self.symmetric):
            raise ValueError("a_group and symmetric: false need a_bits below 16")
        if not self.w_symmetric and (self.a_bits < 16 or self.w_bits > 4):
            raise ValueError(
                "w_symmetric: false needs w_bits of 4 or 3 and a_bits 16: integer linears have no zero point"
            )
        if self.a_group and self.w_group and self.a_group != self.w_group:
            raise ValueError(f"w_group {self.w_group} and a_group {self.a_group} must be equal when both are set")
        return self


class HeadFormat(Part):
    """The LM head: 8 is int8 weights per row with int8 activations per token."""

    bits: Literal[16, 8] = 16


class EmbeddingFormat(Part):
    """The token embedding: 8 is int8 per row."""

    bits: Literal[16, 8] = 16


class AttentionFormat(Part):
    """Operands of attention: keys and values as the cache holds them; `prob_bits` below 16 is for studies in torch."""

    k_bits: Literal[16, 8, 4] = 16
    v_bits: Literal[16, 8, 4] = 16
    prob_bits: Literal[16, 8, 4] = 16
    prob_scale: Literal["unit", "row"] = "unit"
    v_scale: Literal["token", "head_static"] = "token"

    @model_validator(mode="after")
    def _combine(self) -> AttentionFormat:
        if self.v_scale == "head_static" and self.v_bits == 16:
            raise ValueError("v_scale: head_static is a scale of quantised values, and v_bits is 16")
        return self


class Calibration(Part):
    """What the statistics are taken on; `length` in tokens at most, `noise_buckets` split the masked share 0..1.

    `source` is builtin, file:PATH or hf:NAME@COMMIT[:SPLIT[:FIELD]]; `states: clean` masks nothing, as AR models do.
    """

    source: Annotated[str, AfterValidator(check_source)] = "builtin"
    states: Literal["noised", "clean"] = "noised"
    samples: int = Field(default=64, ge=1, le=65536)
    length: int = Field(default=128, ge=8, le=65536)
    seed: int = Field(default=0, ge=0, lt=2**32)
    noise_buckets: int = Field(default=4, ge=1, le=64)


class GptqPart(Part):
    """As `passes.options.Gptq`."""

    damping: float = Field(default=0.01, gt=0, le=1)
    block: int = Field(default=128, ge=1, le=65536)
    act_order: bool = False


class AwqPart(Part):
    """As `passes.options.Awq`."""

    grid: int = Field(default=20, ge=1, le=1000)
    rows: int = Field(default=512, ge=1, le=65536)
    clip: bool = True
    min_clip: float = Field(default=0.5, gt=0, le=1)
    clip_steps: int = Field(default=20, ge=1, le=1000)


class SmoothQuantPart(Part):
    """As `passes.options.SmoothQuant`."""

    alpha: Share = 0.5


class QuaRotPart(Part):
    """As `passes.options.QuaRot`."""

    weights: Literal["gptq", "rtn"] = "gptq"
    clip_weights: bool = True


class DuQuantPart(Part):
    """As `passes.options.DuQuant`."""

    alpha: Share = 0.5
    block: int = Field(default=128, ge=2, le=1024)  # larger ones cost hours: products of [block, block] in float64
    steps: int = Field(default=256, ge=1, le=65536)
    a_clip: float = Field(default=0.9, gt=0, le=1)
    w_clip: float = Field(default=0.8, gt=0, le=1)
    weights: Literal["gptq", "rtn"] = "rtn"


class FlatQuantPart(Part):
    """As `passes.options.FlatQuant`."""

    rate: float = Field(default=5e-3, gt=0, le=1)
    clip_rate: float = Field(default=10.0, ge=0, le=1000)
    epochs: int = Field(default=15, ge=0, le=1000)
    batch: int = Field(default=4, ge=1, le=1024)
    alpha: Share = 0.3
    weights: Literal["gptq", "rtn"] = "rtn"


class FreeActPart(Part):
    """As `passes.options.FreeAct`."""

    share: int = Field(default=32, ge=2, le=65536)


class StarPart(Part):
    """As `passes.options.Star`."""

    share: int = Field(default=32, ge=2, le=65536)
    transform: Literal["kronecker", "dense", "hadamard"] = "kronecker"
    tile: int = Field(default=0, ge=0, le=1024)
    init: Literal["random", "moments"] = "random"
    gate: bool = True
    rate: float = Field(default=1e-3, gt=0, le=1)
    epochs: int = Field(default=15, ge=0, le=1000)
    batch: int = Field(default=4, ge=1, le=1024)
    clip_rate: float = Field(default=0.0, ge=0, le=1000)
    balance: Literal["none", "channels", "kronecker"] = "none"
    weights: Literal["rtn", "gptq", "paired"] = "rtn"


class TacPart(Part):
    """As `passes.options.Tac`."""

    form: Literal["none", "covariance", "paired"] = "covariance"
    block: int = Field(default=16, ge=1, le=256)
    samples: int = Field(default=64, ge=1, le=65536)
    rho: float = Field(default=3e-4, gt=0, le=1)
    eta: Share = 0.15
    alpha: Share = 0.55


class Lowering(Part):
    """The ONNX file: `top_k` ids a head row leave the graph; `debug_logits` adds the whole vocabulary.

    `guidance` writes a second graph on the same weights, of pairs of rows, for classifier-free guidance.
    `cache` says who writes the window's keys and values into the cache: the graph, in the same memory, or its runtime.
    """

    opset: Literal[23, 24] = 24
    cache: Literal["in_place", "window"] = "in_place"
    top_k: int = Field(default=8, ge=1, le=1024)
    debug_logits: bool = False
    guidance: bool = False

    @property
    def files(self) -> tuple[str, ...]:
        """What the stage writes: the model, its weights, and the models with other endings."""
        return (MODEL, MODEL_DATA, SCORE, *([GUIDED] if self.guidance else []))

    @model_validator(mode="after")
    def _combine(self) -> Lowering:
        if self.cache == "in_place" and self.opset < 24:
            raise ValueError(f"opset {self.opset} cannot write a cache in place; use cache: window, or opset: 24")
        return self


class Validation(Part):
    """Limits against the model at full precision; `max_nll_increase` in nats a masked token.

    `min_free_agreement` is against the same graph in torch, on random canvases, where a rounding may move a code.
    """

    max_nll_increase: float = Field(default=0.01, ge=0)
    min_argmax_agreement: Share = 0.99
    min_free_agreement: Share = 0.98
    samples: int = Field(default=32, ge=1, le=65536)
    seed: int = Field(default=0, ge=0, lt=2**32)


def _generation(value: Any) -> GenerateOptions:
    """What `config.json` takes, a recipe takes; and a block that the canvas has no room for is a mistake there."""
    if isinstance(value, GenerateOptions):
        return value
    try:
        options = read_options(value)
    except UsageFault as fault:
        raise ValueError(str(fault)) from None
    if options.gen_length is not None and options.block_length > options.gen_length:
        raise ValueError(f"block_length {options.block_length} is longer than gen_length {options.gen_length}")
    return options


# Defaults of the bundle, each of which an option of the command line or of the call replaces.
Generation = Annotated[GenerateOptions, PlainValidator(_generation), PlainSerializer(asdict)]


class Recipe(Part):
    """Everything a user may decide about one export."""

    schema_version: Literal[1] = 1
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")
    description: str = Field(default="", max_length=500)
    method: Literal["none", "rtn", "smoothquant", "awq", "gptq", "quarot", "duquant", "flatquant", "freeact", "star"]
    linear: LinearFormat = LinearFormat()
    head: HeadFormat = HeadFormat()
    embedding: EmbeddingFormat = EmbeddingFormat()
    attention: AttentionFormat = AttentionFormat()
    skip: Annotated[tuple[StrictStr, ...], Field(strict=False)] = ()
    calibration: Calibration = Calibration()
    gptq: GptqPart = GptqPart()
    awq: AwqPart = AwqPart()
    smoothquant: SmoothQuantPart = SmoothQuantPart()
    quarot: QuaRotPart = QuaRotPart()
    duquant: DuQuantPart = DuQuantPart()
    flatquant: FlatQuantPart = FlatQuantPart()
    freeact: FreeActPart = FreeActPart()
    star: StarPart = StarPart()
    tac: TacPart = TacPart()
    lowering: Lowering = Lowering()
    validation: Validation = Validation()
    generation: Generation = GenerateOptions()
    threads: int = Field(default=2, ge=1, le=1024)

    @model_validator(mode="after")
    def _combine(self) -> Recipe:
        parts = {
            "linear.w_bits": self.linear.w_bits,
            "head.bits": self.head.bits,
            "embedding.bits": self.embedding.bits,
        }
        below = [name for name, bits in parts.items() if bits < 16]
        if self.method == "none" and below:
            raise ValueError(f"method none quantises nothing, but {', '.join(below)} is below 16; set method: rtn")
        if self.method != "none" and not below:
            raise ValueError(f"method {self.method} has nothing to quantise: every part has 16 bits; set method: none")
        if self.generation.guidance > 0 and not self.lowering.guidance:
            raise ValueError(
                f"generation.guidance {self.generation.guidance} needs a graph for it, and lowering.guidance is false; "
                "set it to true, or generation.guidance to 0"
            )
        if self.skip and self.linear.w_bits == 16:
            raise ValueError("skip names linears to keep at 16 bits, but linear.w_bits is 16 already")
        return self

    def options(self) -> Options:
        """The sections of the methods as passes read them."""
        return Options(
            gptq=Gptq(**self.gptq.model_dump()),
            awq=Awq(**self.awq.model_dump()),
            smoothquant=SmoothQuant(**self.smoothquant.model_dump()),
            quarot=QuaRot(**self.quarot.model_dump()),
            duquant=DuQuant(**self.duquant.model_dump()),
            flatquant=FlatQuant(**self.flatquant.model_dump()),
            freeact=FreeAct(**self.freeact.model_dump()),
            star=Star(**self.star.model_dump()),
            tac=Tac(**self.tac.model_dump()),
        )

    def skips(self, linear: str) -> bool:
        """Whether this linear, by our name such as `blocks.0.mlp.down_proj`, stays at 16 bits."""
        return any(fnmatchcase(linear, pattern) for pattern in self.skip)

    def check_exportable(self) -> None:
        """Raise UsageFault for what only the studies in torch may ask."""
        bits = self.attention.prob_bits
        if bits < 16:
            raise UsageFault(
                f"attention.prob_bits {bits} cannot be exported: ONNX's attention does not round its probabilities; "
                "remove it or pass --set attention.prob_bits=16"
            )

    def check_against(self, config: ModelConfig) -> None:
        """Raise UsageFault where this recipe does not fit the model's sizes."""
        inners = {
            "hidden_size": config.hidden_size,
            "attention width": config.num_heads * config.head_dim,
            "intermediate_size": config.intermediate_size,
        }
        for key, group in (("w_group", self.linear.w_group), ("a_group", self.linear.a_group)):
            for name, size in inners.items():
                if group and size % group:
                    raise UsageFault(
                        f"linear.{key} {group} does not divide the model's {name} {size}; "
                        f"pass --set linear.{key}=G with a G that divides it, or 0 for the whole row"
                    )
        for name, size in inners.items():
            if self.linear.w_bits <= 4 and size % 2:
                raise UsageFault(
                    f"linear.w_bits {self.linear.w_bits} stores two codes a byte, but the model's {name} {size} is "
                    "odd; choose a recipe with 8-bit weights, such as rtn-w8a8"
                )
        if self.lowering.top_k > config.vocab_size:
            raise UsageFault(f"lowering.top_k {self.lowering.top_k} exceeds the vocabulary of {config.vocab_size}")
        lengths = {name: getattr(self.generation, name) for name in ("gen_length", "block_length")}
        for name, length in lengths.items():
            if length is not None and length > config.max_length:
                raise UsageFault(
                    f"generation.{name} {length} exceeds the model's maximum length of {config.max_length} tokens; "
                    f"pass --set generation.{name}=N with a smaller N"
                )
        names = linear_names(config)
        for pattern in self.skip:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise UsageFault(f"skip pattern {pattern!r} matches no linear; names look like {names[0]!r}")


def linear_names(config: ModelConfig) -> list[str]:
    """Our names of all linears in the blocks, in order of execution; those that read one input are merged."""
    inside = ("attn.q_k_v_proj", "attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    return [f"blocks.{index}.{name}" for index in range(config.num_layers) for name in inside]
