"""Round to nearest: the baseline of every study; scales from the largest magnitude, no calibration."""

from torch import Tensor

from passes.base import Pass
from passes.insert_fake_quant import InsertFakeQuant
from passes.methods.method import Method
from passes.quant_spec import QuantPlan, QuantSpec
from passes.quantize_weights import QuantizeWeights
from passes.solvers.nearest import round_to_nearest
from passes.store_half import StoreHalf


def _solve(site: str, weight: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    return round_to_nearest(weight, bits=spec.w_bits, group=spec.w_group)


def _passes(plan: QuantPlan) -> list[Pass]:
    return [QuantizeWeights(plan, _solve), InsertFakeQuant(plan), StoreHalf(embedding_bits=plan.embedding_bits)]


METHOD = Method(
    name="rtn", summary="weights and activations rounded to nearest", needs_calibration=False, passes=_passes
)
