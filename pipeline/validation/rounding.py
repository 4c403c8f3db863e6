"""How far float rounding carries: a graph run again with an error of the standard model put on every operation.

The standard model of floating point (Higham, Accuracy and Stability, ch. 2 and 3) gives each float32 operation a
relative error of u = 2^-24, and a sum over n terms t_i, in its random-walk form, one of about sqrt(n) u relative to
sqrt(sum t_i^2). So every result y is moved by a normal draw of deviation

    u sqrt(n) m,    m = |y|, but sqrt(x^2 W^2) for a linear, which may cancel
    n = 1 for a sum or product of two tensors, K for a linear over K, D for a norm over D, 16 for exp, sine and the like
        (four units in the last place), 2 L + 16 for softmax and the sum over L slots, 3 + G for scales, bias and G
        groups of an integer linear (+ 17 for SwiGLU); inside attention, C for the scores over C channels

and what leaves the graph shows how these errors grow or cancel on the way, whatever its depth.
Shape letters: L slots, C channels a head, D hidden, K inner, G groups.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter

import plugins  # noqa: F401  importing it defines torch.ops.dllmc

UNIT = 2.0**-24
FUNCTION = 16  # roundings of an exponential or a sine

aten, ops = torch.ops.aten, torch.ops.dllmc
QUANTIZE = ops.quantize.default
Arguments = Sequence[Any]


def _epilogue(args: Arguments) -> int:
    groups, swiglu = int(args[4].shape[-1]), args[12]
    return 3 + groups + (FUNCTION + 1 if swiglu else 0)


# n of each operation from its arguments; one that is not here moves numbers without computing any.
ROUNDINGS: dict[object, Callable[[Arguments], int]] = {
    aten.add.Tensor: lambda args: 1,
    aten.mul.Tensor: lambda args: 1,
    aten.silu.default: lambda args: FUNCTION,
    aten.cos.default: lambda args: FUNCTION,
    aten.sin.default: lambda args: FUNCTION,
    aten.linear.default: lambda args: args[0].shape[-1],
    aten.rms_norm.default: lambda args: args[0].shape[-1],
    aten.scaled_dot_product_attention.default: lambda args: 2 * args[1].shape[-2] + FUNCTION,
    ops.dequantize_rows.default: lambda args: 1,
    ops.int4_linear.default: _epilogue,
    ops.int8_linear.default: _epilogue,
}
# What an operation rounds before its own non-linear part: which argument stands for it, and its n.
INSIDE: dict[object, tuple[int, Callable[[Arguments], int]]] = {
    aten.scaled_dot_product_attention.default: (0, lambda args: args[0].shape[-1]),
    ops.head.default: (1, lambda args: 4),
}


class Rounded(Interpreter):
    """Runs a lowered graph and keeps what entered and left every quantiser.

    With `draw` every operation is off by `scale` times its error; with `codes` quantisers give these instead.
    """

    def __init__(
        self,
        graph: GraphModule,
        *,
        draw: torch.Generator | None = None,
        scale: float = 1.0,
        codes: Sequence[Sequence[Tensor]] | None = None,
    ) -> None:
        super().__init__(graph)
        self.draw, self.scale, self.codes = draw, scale, codes
        self.entered: list[Tensor] = []
        self.left: list[list[Tensor]] = []

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is QUANTIZE:
            self.entered.append(args[0])
            if self.codes is not None:
                self.left.append(list(self.codes[len(self.left)]))
            else:
                self.left.append(list(super().call_function(target, args, kwargs)))
            return self.left[-1]
        if self.draw is None:
            return super().call_function(target, args, kwargs)
        if target in INSIDE:
            place, count = INSIDE[target]
            args = (*args[:place], self._moved(args[place], count(args), args[place].abs()), *args[place + 1 :])
        result = super().call_function(target, args, kwargs)
        if target not in ROUNDINGS or not result.is_floating_point():
            return result
        magnitude = result.abs()
        if target is aten.linear.default:
            magnitude = torch.nn.functional.linear(args[0].square(), args[1].square()).sqrt()
        return self._moved(result, ROUNDINGS[target](args), magnitude)

    def _moved(self, value: Tensor, count: int, magnitude: Tensor) -> Tensor:
        error = torch.randn(value.shape, generator=self.draw).mul_(self.scale * UNIT * math.sqrt(count))
        return value + magnitude * error
