"""What the kernels are checked on: every op, format, option and edge of a tile, on every path that may take it.

A case says how to call an op; its tensors are drawn afresh in every run.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bench.gpu.kernels import SMALL_ROWS
from bench.gpu.operands import Draws
from bench.gpu.shapes import ModelShape, gate_slices
from plugins.int4 import code_limit

EDGE_ROWS = (1, 7, 8, 9, 31, 33, 37, 64, 65, 130, 257)
FORMATS = {"w4a4": (4, 4), "w4a8": (8, 4), "w8a8": (8, 8), "w3a3": (3, 3)}
LINEAR_PATHS = ("auto", "naive", "small", "large", "hopper")
QUANTIZE_PATHS = ("auto", "naive", "rows", "tile", "exact")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call: sizes and options of an op on one path. `forced` paths may refuse what they do not take."""

    op: str
    name: str
    path: str
    sizes: dict[str, int]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Unique among the cases."""
        return f"{self.op} {self.name} {self.path}"


def linear_call(case: Case, draws: Draws) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of `Kernels.linear`."""
    rows, inner, outputs = (case.sizes[name] for name in ("rows", "inner", "outputs"))
    a_bits, w_bits = FORMATS[case.options["format"]]
    a_group, w_group = case.options.get("a_group", 0), case.options.get("w_group", 0)
    groups = inner // (a_group or w_group or inner)
    swiglu, y_type = case.options.get("swiglu", False), case.options.get("y_type", torch.float32)
    scale = draws.between(0.25, 2.0, rows, groups if a_group else 1)
    # Codes are uniform, so this makes y about as large as scale.
    size = 3.0 / (code_limit(a_bits) * code_limit(w_bits) * inner**0.5)
    w_scale = draws.between(0.5 * size, 1.5 * size, outputs, groups if w_group else 1)
    given: dict[str, Any] = {"a_bits": a_bits, "w_bits": w_bits, "a_group": a_group, "w_group": w_group}
    given |= {"swiglu": swiglu, "y_type": y_type, "layout": case.options.get("layout", 1), "path": case.path}
    zero = None
    if case.options.get("zero"):
        zero = draws.integers(-7, 7, *scale.shape)
        given["w_sum"] = draws.integers(-500, 500, outputs, groups)
    if case.options.get("bias"):
        given["bias"] = draws.normal(outputs)
    if residual := case.options.get("residual"):
        given["residual"] = draws.normal(rows, outputs).to(residual)
    codes, weight = draws.packed(a_bits, rows, inner), draws.packed(w_bits, outputs, inner)
    return (codes, scale, zero, weight, w_scale), given


def quantize_call(case: Case, draws: Draws) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of `Kernels.quantize`."""
    rows, inner = case.sizes["rows"], case.sizes["inner"]
    known = ("bits", "symmetric", "a_group", "clip_lo", "clip_hi", "eps")
    given: dict[str, Any] = {name: case.options[name] for name in known if name in case.options}
    given["path"] = case.path
    if case.options.get("norm"):
        given["norm_weight"] = draws.between(0.5, 1.5, inner)
    if case.options.get("channel_scale"):
        given["channel_scale"] = draws.between(0.5, 1.5, inner)
    if case.options.get("tac"):
        given["tac_matrix"], given["tac_bias"] = draws.compensation(inner)
    if case.options.get("transform"):
        given["left"], given["right"] = draws.factors(inner)
    if case.options.get("state"):
        given |= {"state": draws.integers(0, 1, rows), "gate_axis": 1, "gate_size": gate_slices(inner)}
    x = draws.activations(rows, inner, case.options.get("x_type", torch.float32))
    if rows > 2 and case.options.get("zero_row"):
        x[1] = 0.0
    return (x,), given


def head_call(case: Case, draws: Draws) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of `Kernels.head`."""
    batch, rows, inner, vocabulary, top_k = (
        case.sizes[name] for name in ("batch", "rows", "inner", "vocabulary", "top_k")
    )
    bias = torch.where(draws.between(0.0, 1.0, vocabulary) < case.options.get("banned", 0.01), -1e9, 0.0)
    codes = draws.packed(8, batch * rows, inner).reshape(batch, rows, inner)
    scale, w_scale = draws.between(0.005, 0.02, batch, rows, 1), draws.between(0.0005, 0.002, vocabulary, 1)
    tensors = (codes, scale, draws.packed(8, vocabulary, inner), w_scale, bias, draws.between(0.5, 2.0, batch))
    return (*tensors, top_k), {"layout": 1, "path": case.path}


def rotate_call(case: Case, draws: Draws) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of `Kernels.rotate`."""
    rows, inner, block = (case.sizes[name] for name in ("rows", "inner", "block"))
    permutation = torch.randperm(inner, generator=draws.generator, device=draws.device)
    x = draws.activations(rows, inner, case.options.get("x_type", torch.float32))
    blocks: Tensor = torch.stack([draws.orthogonal(block) for _ in range(inner // block)])
    return (x, blocks, permutation), {"y_type": case.options.get("y_type", torch.float32), "path": case.path}


CALLS = {"linear": linear_call, "quantize": quantize_call, "head": head_call, "rotate": rotate_call}


def _linear_options() -> Iterator[tuple[str, dict[str, Any]]]:
    half = torch.float16
    for form in FORMATS:
        yield form, {"format": form}
    yield "canonical", {"format": "w4a4", "layout": 0}
    for form in ("w4a4", "w4a8", "w8a8"):
        yield f"{form} bias half", {"format": form, "bias": True, "y_type": half}
        yield f"{form} zero", {"format": form, "zero": True}
        yield f"{form} swiglu bias", {"format": form, "swiglu": True, "bias": True, "y_type": half}
        yield f"{form} swiglu", {"format": form, "swiglu": True}
        yield f"{form} residual", {"format": form, "residual": torch.float32}
        yield f"{form} half residual", {"format": form, "residual": half, "bias": True, "y_type": half}
        yield f"{form} weight groups", {"format": form, "w_group": 128, "bias": True}
        yield f"{form} groups zero", {"format": form, "a_group": 128, "w_group": 128, "zero": True}


def _linear_cases(paths: tuple[str, ...]) -> Iterator[Case]:
    sizes = itertools.cycle(itertools.product((128, 256, 384, 1024), (16, 48, 128, 272)))
    for (name, options), path in itertools.product(_linear_options(), paths):
        if options.get("layout") == 0 and path != "naive":
            continue
        for rows in EDGE_ROWS if path in ("auto", "small", "large") else EDGE_ROWS[::3]:
            inner, outputs = next(sizes)
            chosen = {"rows": rows, "inner": inner, "outputs": outputs}
            if path != "small" or rows <= SMALL_ROWS:
                yield Case(
                    op="linear", name=f"{name} {rows}x{inner}x{outputs}", path=path, sizes=chosen, options=options
                )


def _quantize_options() -> Iterator[tuple[str, dict[str, Any]]]:
    half = torch.float16
    whole = {"norm": True, "transform": True, "state": True}
    yield "plain", {"zero_row": True}
    yield "plain half", {"x_type": half, "clip_hi": 0.9}
    yield "asymmetric", {"symmetric": False, "clip_lo": 0.95, "clip_hi": 0.9}
    yield "groups", {"a_group": 128, "symmetric": False}
    yield "8 bits", {"bits": 8}
    yield "3 bits", {"bits": 3, "x_type": half}
    yield "norm", {"norm": True}
    yield "norm scale 8 bits", {"norm": True, "channel_scale": True, "bits": 8, "eps": 1e-6}
    yield "transform", {"transform": True, "x_type": half}
    yield "norm transform state", whole
    yield "tac transform state", {"tac": True, "transform": True, "state": True, "x_type": half}
    yield "tac", {"tac": True, "x_type": half}
    yield "asymmetric transform", {"symmetric": False, **whole}
    yield "8 bits transform", {"bits": 8, **whole}


def _quantize_cases(paths: tuple[str, ...], sizes: tuple[int, ...]) -> Iterator[Case]:
    for (name, options), path, inner in itertools.product(_quantize_options(), paths, sizes):
        for rows in (1, 9, 33) if inner < 4096 else (5,):
            chosen = {"rows": rows, "inner": inner}
            yield Case(op="quantize", name=f"{name} {rows}x{inner}", path=path, sizes=chosen, options=options)


def _head_cases(vocabulary: int) -> Iterator[Case]:
    for path, (batch, rows, top_k) in itertools.product(
        ("auto", "naive"), ((1, 1, 1), (1, 9, 8), (2, 32, 8), (3, 31, 64))
    ):
        for banned in (0.0, 0.5):
            sizes = {"batch": batch, "rows": rows, "inner": 192, "vocabulary": vocabulary, "top_k": top_k}
            name = f"{batch}x{rows} top {top_k} banned {banned:g}"
            yield Case(op="head", name=name, path=path, sizes=sizes, options={"banned": banned})


def _rotate_cases() -> Iterator[Case]:
    types = (torch.float32, torch.float16)
    for path, block, (x_type, y_type) in itertools.product(
        ("auto", "naive"), (8, 16, 64), itertools.product(types, types)
    ):
        sizes, options = {"rows": 9, "inner": 192, "block": block}, {"x_type": x_type, "y_type": y_type}
        name = f"block {block} {str(x_type)[6:]} to {str(y_type)[6:]}"
        yield Case(op="rotate", name=name, path=path, sizes=sizes, options=options)


def all_cases() -> list[Case]:
    """Edges of tiles on every path, at sizes that a reference computes at once."""
    small = [*_quantize_cases(QUANTIZE_PATHS, (128, 384, 768))]
    return [*_linear_cases(LINEAR_PATHS), *small, *_head_cases(1008), *_rotate_cases()]


def real_cases(shape: ModelShape) -> list[Case]:
    """The calls of one model at their real sizes, on the path that the plan chooses and on each forced one."""
    found = []
    for gemm, rows, path in itertools.product(shape.gemms, (33, 520), ("auto", "small", "large", "hopper")):
        if path == "small" and rows > SMALL_ROWS:
            continue
        options = {"format": "w4a4", "swiglu": gemm.swiglu, "bias": gemm.bias}
        options |= {"residual": torch.float32} if gemm.residual else {"y_type": torch.float16}
        sizes = {"rows": rows, "inner": gemm.inner, "outputs": gemm.outputs}
        name = f"{shape.name} {gemm.name} {rows}"
        found.append(Case(op="linear", name=name, path=path, sizes=sizes, options=options))
    whole = {"transform": True, "state": True}
    sites: dict[str, tuple[int, dict[str, Any]]] = {
        "attention": (shape.hidden, {"norm": True, **whole}),
        "output": (shape.attention, {"tac": True, "x_type": torch.float16, **whole}),
        "down": (shape.inner, {"x_type": torch.float16, **whole}),
        "head": (shape.hidden, {"norm": True, "bits": 8}),
    }
    for name, (inner, options) in sites.items():
        sizes = {"rows": 37, "inner": inner}
        found.append(Case(op="quantize", name=f"{shape.name} {name}", path="auto", sizes=sizes, options=options))
    sizes = {"batch": 1, "rows": 32, "inner": shape.hidden, "vocabulary": shape.vocabulary, "top_k": 8}
    found.append(Case(op="head", name=f"{shape.name} head", path="auto", sizes=sizes))
    return found
