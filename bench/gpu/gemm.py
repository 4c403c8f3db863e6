"""Every linear of both models against cuBLAS bf16 and torch's int8 product, each path forced as well as chosen.

Weights rotate over at least 512 MB, so that no cache holds them; ours runs with its whole epilogue, the two others
compute the bare product.
Shape letters: M rows, K inner, N outputs.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.gpu.kernels import SMALL_ROWS, Kernels
from bench.gpu.machine import Machine
from bench.gpu.operands import Draws
from bench.gpu.section import Item, Plan, Row, Section
from bench.gpu.shapes import MODELS, ROWS, TINY_MODELS, Gemm
from bench.gpu.timing import Times, capture_all, copies, interleaved, paired

PATHS = ("auto", "small", "large", "hopper")
INT8_ROWS = 17  # torch's int8 product takes no fewer


def _ours(
    kernels: Kernels, gemm: Gemm, rows: int, machine: Machine, draws: Draws, path: str
) -> tuple[Callable[[], None], int]:
    """One launch a weight, the epilogue as in a block; and how many weights."""
    number = copies(gemm.weights // 2, machine)
    weights = [draws.packed(4, gemm.outputs, gemm.inner) for _ in range(number)]
    codes, scale = draws.packed(4, rows, gemm.inner), draws.between(0.5, 1.5, rows, 1)
    w_scale = draws.between(0.001, 0.002, gemm.outputs, 1)
    given: dict[str, Any] = {"swiglu": gemm.swiglu, "path": path}
    given["y_type"] = torch.float32 if gemm.residual else torch.float16
    if gemm.bias:
        given["bias"] = draws.normal(gemm.outputs)
    if gemm.residual:
        given["residual"] = draws.normal(rows, gemm.outputs)

    def launch() -> None:
        for weight in weights:
            kernels.linear(codes, scale, None, weight, w_scale, **given)

    return launch, number


def _product(
    multiply: Callable[..., Tensor], x: Tensor, weights: list[Tensor], y: Tensor
) -> tuple[Callable[[], None], int]:
    def launch() -> None:
        for weight in weights:
            multiply(x, weight.t(), out=y)

    return launch, len(weights)


def _bf16(gemm: Gemm, rows: int, machine: Machine, draws: Draws) -> tuple[Callable[[], None], int]:
    number, bf16 = copies(gemm.weights * 2, machine), torch.bfloat16
    weights = [draws.normal(gemm.outputs, gemm.inner, dtype=bf16) for _ in range(number)]
    x = draws.normal(rows, gemm.inner, dtype=bf16)
    return _product(torch.mm, x, weights, x.new_empty(rows, gemm.outputs))


def _int8(gemm: Gemm, rows: int, machine: Machine, draws: Draws) -> tuple[Callable[[], None], int]:
    number = copies(gemm.weights, machine)
    weights = [draws.packed(8, gemm.outputs, gemm.inner) for _ in range(number)]
    x = draws.packed(8, rows, gemm.inner)
    return _product(torch._int_mm, x, weights, torch.empty(rows, gemm.outputs, dtype=torch.int32, device=x.device))


def measure_gemm(plan: Plan, gemm: Gemm, rows: int, seed: int) -> Row:
    """Milliseconds a launch of every contender; a path that does not take the shape says why."""
    machine, draws = plan.machine, Draws(plan.machine.device, seed)
    kernels = machine.load(False)
    makers = {"bf16": partial(_bf16, gemm, rows, machine, draws)}
    if rows >= INT8_ROWS:
        makers["int8"] = partial(_int8, gemm, rows, machine, draws)
    for path in PATHS:
        if path != "small" or rows <= SMALL_ROWS:
            makers[path] = partial(_ours, kernels, gemm, rows, machine, draws, path)
    launches: dict[str, int] = {}
    bodies: dict[str, Callable[[], None]] = {}
    for name, make in makers.items():
        bodies[name], launches[name] = make()
    replays, refused = capture_all(machine, bodies)
    row: Row = {"rows": rows, "inner": gemm.inner, "outputs": gemm.outputs, "refused": refused}
    found = interleaved(machine, replays)
    times = {name: Times([ms / launches[name] for ms in found[name].ms]) for name in found}
    row["contenders"] = {name: times[name].as_json() for name in times}
    row["against_bf16"] = {path: paired(times["bf16"], times[path]) for path in PATHS if path in times}
    row["bytes"] = gemm.weights // 2
    row["bytes_per_s"] = {path: row["bytes"] / (times[path].median * 1e-3) for path in PATHS if path in times}
    row["flops"] = 2 * rows * gemm.weights
    return row


def _items(plan: Plan) -> Iterator[Item]:
    tiny = plan.machine.emulated
    number = 0
    # The rows that the verdicts ask for come first, so that a short session has them.
    for rows in (8, 33) if tiny else sorted(ROWS, key=lambda m: (m not in (32, 1024, 2048, 8192), m)):
        for shape in TINY_MODELS if tiny else MODELS:
            for gemm in shape.gemms:
                number += 1
                yield f"{shape.name} {gemm.name} {rows}", partial(measure_gemm, plan, gemm, rows, plan.seed + number)


def _said(row: Row) -> str:
    times = ", ".join(f"{name} {1e3 * found['ms']:.1f}" for name, found in row["contenders"].items())
    best = {path: found["ratio"] for path, found in row["against_bf16"].items()}
    ratio = f"; auto {best['auto']:.2f} x bf16, {row['bytes_per_s']['auto'] / 1e9:.0f} GB/s" if "auto" in best else ""
    return f"us: {times}{ratio}"


GEMM = Section(
    name="gemm", about="the linears against cuBLAS bf16 and torch's int8", items=_items, said=_said, slowest_s=8.0
)
