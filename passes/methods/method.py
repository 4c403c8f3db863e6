"""What a quantisation method is: the passes it runs between a float graph and a simulated quantised one."""

from collections.abc import Callable
from dataclasses import dataclass

from passes.base import Pass
from passes.quant_spec import QuantPlan


@dataclass(frozen=True, kw_only=True)
class Method:
    """`passes` makes the list for one plan; `needs_calibration` says whether it reads activations."""

    name: str
    summary: str
    needs_calibration: bool
    passes: Callable[[QuantPlan], list[Pass]]
