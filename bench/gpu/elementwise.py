"""The fused element-wise kernels (norm, TAC, transform, gate, amax and pack) against copies of as many bytes.

Inputs and outputs rotate over at least 512 MB (fewer where rows are few).
Shape letters: M rows, K inner.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from bench.gpu.kernels import Kernels
from bench.gpu.operands import Draws
from bench.gpu.section import Item, Plan, Row, Section
from bench.gpu.shapes import MODELS, TINY_MODELS, ModelShape, gate_slices
from bench.gpu.timing import Times, capture_all, copies, interleaved
from plugins.int4 import codes_per_byte

ROWS = (32, 512, 1024, 2048, 8192)
PATHS = ("auto", "rows", "tile", "exact")
HALF, FLOAT = torch.float16, torch.float32

# Site -> type of x, options; the plain ones have no transform, as methods without one.
SITES: dict[str, tuple[torch.dtype, tuple[str, ...]]] = {
    "qkv": (FLOAT, ("norm", "transform")),
    "o": (HALF, ("tac", "transform")),
    "down": (HALF, ("transform",)),
    "qkv plain": (FLOAT, ("norm",)),
    "down plain": (HALF, ()),
    "head": (FLOAT, ("norm", "8 bits")),
}


def site_size(shape: ModelShape, site: str) -> int:
    """K of a site."""
    return {"o": shape.attention, "down": shape.inner}.get(site.split()[0], shape.hidden)


def site_options(options: tuple[str, ...], size: int, rows: int, draws: Draws) -> dict[str, Any]:
    """Arguments of `Kernels.quantize` beside x."""
    given: dict[str, Any] = {"bits": 8 if "8 bits" in options else 4}
    if "norm" in options:
        given["norm_weight"] = draws.between(0.5, 1.5, size)
    if "tac" in options:
        given["tac_matrix"], given["tac_bias"] = draws.compensation(size)
    if "transform" in options:
        given["left"], given["right"] = draws.factors(size)
        given |= {"state": draws.integers(0, 1, rows), "gate_axis": 1, "gate_size": gate_slices(size)}
    return given


def bytes_moved(rows: int, size: int, x_type: torch.dtype, bits: int) -> int:
    """x read once, codes and scale written once."""
    return rows * (size * x_type.itemsize + size // codes_per_byte(bits) + 4)


def _launch(kernels: Kernels, inputs: list[torch.Tensor], given: dict[str, Any], path: str) -> Callable[[], Any]:
    # Outputs are kept until the last launch, so that each has memory of its own.
    return lambda: [kernels.quantize(x, path=path, **given) for x in inputs]


def _copy(sources: list[torch.Tensor], targets: list[torch.Tensor], negate: bool) -> Callable[[], Any]:
    def launch() -> None:
        for source, target in zip(sources, targets, strict=True):
            if negate:
                torch.neg(source, out=target)
            else:
                target.copy_(source)

    return launch


def measure_site(plan: Plan, shape: ModelShape, site: str, rows: int, seed: int) -> Row:
    """Milliseconds a launch, and bytes a second, of every path and of copies of the same size."""
    machine, draws = plan.machine, Draws(plan.machine.device, seed)
    kernels, size = machine.load(False), site_size(shape, site)
    x_type, options = SITES[site]
    given = site_options(options, size, rows, draws)
    moved = bytes_moved(rows, size, x_type, given["bits"])
    number = copies(rows * size * x_type.itemsize, machine)
    inputs = [draws.normal(rows, size, dtype=x_type) for _ in range(number)]
    sources = [draws.normal(moved // 8) for _ in range(number)]
    targets = [torch.empty_like(source) for source in sources]
    bodies = {"copy": _copy(sources, targets, False), "negation": _copy(sources, targets, True)}
    bodies |= {path: _launch(kernels, inputs, given, path) for path in PATHS}
    replays, refused = capture_all(machine, bodies)
    row: Row = {"rows": rows, "inner": size, "bytes": moved, "refused": refused}
    found = interleaved(machine, replays)
    times = {name: Times([ms / number for ms in found[name].ms]) for name in found}
    row["contenders"] = {name: times[name].as_json() for name in times}
    row["bytes_per_s"] = {name: moved / (times[name].median * 1e-3) for name in times}
    return row


def _items(plan: Plan) -> Iterator[Item]:
    tiny, number = plan.machine.emulated, 0
    for shape in TINY_MODELS if tiny else MODELS:
        for site in SITES:
            for rows in (9,) if tiny else ROWS:
                number += 1
                yield f"{shape.name} {site} {rows}", partial(measure_site, plan, shape, site, rows, plan.seed + number)


def _said(row: Row) -> str:
    return ", ".join(
        f"{name} {1e3 * found['ms']:.1f} us {row['bytes_per_s'][name] / 1e9:.0f} GB/s"
        for name, found in row["contenders"].items()
    )


ELEMENTWISE = Section(
    name="elementwise", about="the fused element-wise kernels against copies", items=_items, said=_said, slowest_s=5.0
)
