"""A whole pass checked call by call: every kernel against the reference on the very inputs it got in the model.

Then the pass as a captured graph against the same pass launched call by call: the workspace and memory that a graph
reuses must not show.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.gpu.compare import compare_call
from bench.gpu.kernels import Codes, Kernels, References
from bench.gpu.machine import Machine
from bench.gpu.model import Recorded
from bench.gpu.operands import Draws
from bench.gpu.passes import pass_cases, prepare_pass, whole_pass
from bench.gpu.quantized import METHODS, QuantizedModel
from bench.gpu.section import Row
from bench.gpu.shapes import ModelShape
from bench.gpu.timing import capture

CPU = torch.device("cpu")


class Compared:
    """Kernels whose every call is checked on the CPU; `wrong` collects what differs, the pass goes on."""

    def __init__(self, kernels: Kernels) -> None:
        self._kernels, self._references = kernels, References()
        self.calls = 0
        self.wrong: list[str] = []

    def _checked(self, op: str, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        found = getattr(self._kernels, op)(*given, **named)
        cpu_given, cpu_named = on_cpu(given), dict(zip(named, on_cpu(tuple(named.values())), strict=True))
        expected = getattr(self._references, op)(*cpu_given, **cpu_named)
        self.calls += 1
        wrong = compare_call(op, outputs(found, CPU), outputs(expected, CPU), cpu_given, cpu_named)
        self.wrong += [f"call {self.calls}, {op}: {wrong}"] if wrong else []
        return found

    def quantize(self, x: Tensor, **named: Any) -> Codes:
        return self._checked("quantize", (x,), named)  # type: ignore[no-any-return]

    def linear(self, *given: Any, **named: Any) -> Tensor:
        # The model names weight and w_scale; the rule of the op wants tensors first.
        return self._checked("linear", given, named)  # type: ignore[no-any-return]

    def head(self, *given: Any, **named: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self._checked("head", given, named)  # type: ignore[no-any-return]

    def rotate(self, *given: Any, **named: Any) -> Tensor:
        return self._checked("rotate", given, named)  # type: ignore[no-any-return]


def on_cpu(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same arguments with tensors on the CPU, where references are computed."""
    return tuple(value.cpu() if isinstance(value, Tensor) else value for value in values)


def outputs(result: Tensor | tuple[Tensor, ...], device: torch.device) -> list[Tensor]:
    """One tensor or several, as a list on a device."""
    return [tensor.to(device) for tensor in ((result,) if isinstance(result, Tensor) else result)]


def _replayed(machine: Machine, model: QuantizedModel, case: Any, seed: int) -> str | None:
    """What differs between a pass and its captured graph."""
    run = partial(whole_pass, model, prepare_pass(model, case, Draws(machine.device, seed)))
    kept: list[Recorded] = []

    def body() -> None:
        kept[:] = [run()]

    replay = capture(machine, body)
    replay()
    machine.synchronize()
    plain, graph = run(), kept[0]
    if torch.equal(plain.ids, graph.ids) and torch.equal(plain.tail, graph.tail):
        return None
    return f"graph and plain pass differ: {graph.ids.tolist()[:4]}, expected {plain.ids.tolist()[:4]}"


def check_model(machine: Machine, shape: ModelShape, seed: int) -> Row:
    """Every pass of a small model, call by call, and as a graph."""
    row: Row = {"checked": 0, "by_path": {}, "refused": {}, "wrong": {}}
    for method in METHODS:
        compared = Compared(machine.load(True))
        model = QuantizedModel(shape, machine, compared, Draws(machine.device, seed), method)
        for case in pass_cases(tiny=True):
            whole_pass(model, prepare_pass(model, case, Draws(machine.device, seed + 1)))
            if wrong := compared.wrong[:3]:
                row["wrong"][f"{shape.name} {method} {case.name}"] = "; ".join(wrong)
        row["checked"] += compared.calls
        model.kernels = machine.load(False)
        for case in pass_cases(tiny=True):
            if text := _replayed(machine, model, case, seed + 2):
                row["wrong"][f"{shape.name} {method} {case.name} replayed"] = text
    return row
