"""What the device can do at most, measured: bandwidth of copies and reads, products in bf16 and int8."""

from collections.abc import Iterator
from functools import partial

import torch

from bench.gpu.operands import Draws
from bench.gpu.section import Item, Plan, Row, Section
from bench.gpu.timing import capture, interleaved

COPY_BYTES = 2**31
SQUARE = 8192


def _bandwidth(plan: Plan) -> Row:
    """Bytes a second of copies (read and written) and of reads, each the best of several ways."""
    elements = (2**16 if plan.machine.emulated else COPY_BYTES) // 4
    source = Draws(plan.machine.device, plan.seed).normal(elements)
    target = torch.empty_like(source)
    ways = {
        "copy by copy": lambda: target.copy_(source),
        "copy by negation": lambda: torch.neg(source, out=target),
        "read by sum": lambda: source.sum(),
        "read by maximum": lambda: source.amax(),
        "read by halves summed": lambda: source.view(torch.bfloat16).sum(dtype=torch.float32),
    }
    times = interleaved(plan.machine, {name: capture(plan.machine, way) for name, way in ways.items()})
    moved = {name: source.nbytes * (2 if name.startswith("copy") else 1) for name in ways}
    rates = {name: moved[name] / (times[name].median * 1e-3) for name in ways}
    copy = max(rate for name, rate in rates.items() if name.startswith("copy"))
    read = max(rate for name, rate in rates.items() if name.startswith("read"))
    return {"ways": rates, "copy": copy, "read": read, "bandwidth": max(copy, read)}


def _products(plan: Plan) -> Row:
    """Operations a second of square products on random data."""
    size = 64 if plan.machine.emulated else SQUARE
    draws = Draws(plan.machine.device, plan.seed)
    a, b = (draws.normal(size, size, dtype=torch.bfloat16) for _ in range(2))
    c, d = (draws.integers(-127, 127, size, size, dtype=torch.int8) for _ in range(2))
    ways = {"bf16": lambda: torch.mm(a, b.t()), "int8": lambda: torch._int_mm(c, d.t())}
    times = interleaved(plan.machine, {name: capture(plan.machine, way) for name, way in ways.items()}, repeat_ms=50.0)
    return {f"{name}_flops": 2 * size**3 / (times[name].median * 1e-3) for name in ways} | {
        name: times[name].as_json() for name in ways
    }


def _items(plan: Plan) -> Iterator[Item]:
    yield "bandwidth", partial(_bandwidth, plan)
    yield "products", partial(_products, plan)


def _said(row: Row) -> str:
    if "copy" in row:
        return f"copy {row['copy'] / 1e9:.0f} GB/s, read {row['read'] / 1e9:.0f} GB/s"
    return f"bf16 {row['bf16_flops'] / 1e12:.0f} TFLOP/s, int8 {row['int8_flops'] / 1e12:.0f} TOP/s"


CEILINGS = Section(
    name="ceilings", about="bandwidth and products of this device", items=_items, said=_said, slowest_s=15.0
)
