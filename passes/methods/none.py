"""No quantisation: the float16 baseline."""

from passes.base import Pass
from passes.methods.method import Method
from passes.quant_spec import QuantPlan
from passes.store_half import StoreHalf


def _passes(plan: QuantPlan) -> list[Pass]:
    return [StoreHalf(embedding_bits=plan.embedding_bits)]


METHOD = Method(name="none", summary="float16 weights, nothing quantised", needs_calibration=False, passes=_passes)
