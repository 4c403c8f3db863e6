"""What a quantisation method is: the passes between a float graph and a simulated quantised one."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from passes.base import Pass
from passes.fit import Fit
from passes.insert_fake_quant import InsertFakeQuant
from passes.quant_spec import QuantPlan
from passes.quantize_attention import QuantizeAttention
from passes.quantize_in_sequence import QuantizeInSequence
from passes.quantize_paired import QuantizePaired
from passes.quantize_weights import QuantizeWeights, nearest
from passes.store_half import StoreHalf

Passes = Callable[[QuantPlan, Fit], list[Pass]]

# (weight bits, activation bits)
WEIGHT_ONLY = frozenset({(8, 16), (4, 16), (3, 16)})
INTEGER = frozenset({(8, 8), (4, 8), (4, 4)})


def no_passes(plan: QuantPlan, fit: Fit) -> list[Pass]:
    """Nothing to do at this point."""
    return []


@dataclass(frozen=True, kw_only=True)
class Method:
    """`rewrite` leaves the float function as it is, `solve` puts weights on their grids.

    `formats` are the (weight, activation) bits it can do. The next block is calibrated on what this one gives with its
    weights `quantized` (activations float), or with `float` ones. `rotates_stream`: the residual stream of the
    rewritten graph is that of the model times `rotate_stream.stream_rotation`. What `correct` does comes last, on the
    quantised graph; with `pairs` it and `solve` see the float piece and what the quantised blocks before give.
    """

    name: str
    summary: str
    needs_calibration: bool
    formats: frozenset[tuple[int, int]]
    solve: Passes
    rewrite: Passes = no_passes
    inputs: Literal["float", "quantized"] = "float"
    rotates_stream: bool = False
    correct: Passes = no_passes
    pairs: bool = False

    def solves_with_hessians(self, plan: QuantPlan) -> bool:
        """Whether weights are solved by second moments of K channels, which fewer than K rows cannot fill."""
        return any(isinstance(one, QuantizeInSequence | QuantizePaired) for one in self.solve(plan, Fit()))

    def solving(self, plan: QuantPlan, fit: Fit) -> list[Pass]:
        """Weights of the blocks by the method, those of the head rounded to nearest."""
        blocks, ends = replace(plan, head=None), replace(plan, linear=None)
        return [*self.solve(blocks, fit), QuantizeWeights(ends, nearest)]

    def finishing(self, plan: QuantPlan, fit: Fit) -> list[Pass]:
        """What every method ends with: activations on their grids, 16 bits for what stays float, corrections."""
        attention: list[Pass] = [] if plan.attention.is_float else [QuantizeAttention(plan)]
        stored = StoreHalf(embedding_bits=plan.embedding_bits)
        return [InsertFakeQuant(plan, fit.numbers), *attention, stored, *self.correct(plan, fit)]

    def passes(self, plan: QuantPlan, fit: Fit | None = None) -> list[Pass]:
        """Float graph to simulated quantised graph, all at once."""
        fit = fit or Fit()
        return [*self.rewrite(plan, fit), *self.solving(plan, fit), *self.finishing(plan, fit)]
